"""One decoding step of all rows, on buffers that stay where they are.

Everything a step reads and writes on the device lives in `Decoder`, and `Decoder.step` neither looks at a result nor
depends on one: the same lines run eagerly on a CPU and as a captured CUDA graph (`graphs.py`).

Letters: R rows at most, B rows in use, T new tokens at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_fast.attention.decode import DecodePlan
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.sampling import draw
from grpo_fast.models.head import HeadSpec


class Decoder:
    """The rows' state beside their keys and values, and the step that advances it."""

    def __init__(
        self, model: PreTrainedModel, head: HeadSpec, cache: DecodePlan, *, max_rows: int, max_new_tokens: int
    ) -> None:
        self.base = model.base_model
        self.head = head
        self.cache = cache
        self.max_rows, self.max_new_tokens = max_rows, max_new_tokens
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.last_position = (limit or 1 << 40) - 1
        device = head.weight.device
        self.token = torch.zeros(max_rows, 1, dtype=torch.int64, device=device)  # (R, 1) the next one fed
        self.position = torch.zeros(max_rows, 1, dtype=torch.int64, device=device)  # (R, 1) its position
        self.drawn = torch.zeros(max_rows, 1, dtype=torch.int64, device=device)  # (R, 1) tokens drawn so far
        self.uniform = torch.zeros(max_rows, max_new_tokens, dtype=torch.float64, device=device)  # (R, T)
        self.result = torch.zeros(2, max_rows, dtype=torch.float64, device=device)  # token, log-prob

    def forward(self, ids: Tensor, positions: Tensor, plan: PackedPlan | DecodePlan) -> Tensor:
        """Hidden states (rows, length, H) of one pass through the model's body."""
        return self.base(
            input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, plan=plan
        ).last_hidden_state

    def step(self, rows: int, sampling: Sampling) -> Tensor:
        """One more token for the first `rows` rows; (2, rows) float64 on the device: tokens and log-probs."""
        token, position, drawn = self.token[:rows], self.position[:rows], self.drawn[:rows]
        self.cache.begin(rows, drawn[:, 0])
        hidden = self.forward(token, position, self.cache)[:, 0]  # (B, H)
        # the last column stands in for rows that padding or a late stop has carried past it
        uniform = self.uniform[:rows].gather(1, drawn.clamp(max=self.max_new_tokens - 1))[:, 0]
        chosen, logprob = draw(self.head.exact_logits(hidden), uniform, sampling)
        token.copy_(chosen[:, None])
        position.add_(1).clamp_(max=self.last_position)  # rows that only fill a graph go on counting
        drawn.add_(1)
        result = self.result[:, :rows]
        result[0].copy_(chosen)
        result[1].copy_(logprob)
        return result

    def add(self, first: int, token: Tensor, lengths: Sequence[int], uniform: np.ndarray) -> None:
        """Rows from `first` on: first tokens (n,), drawn already, lengths of the prompts, streams (n, up to T)."""
        rows = slice(first, first + len(lengths))
        self.token[rows] = token[:, None]
        self.position[rows] = torch.tensor(lengths, device=token.device)[:, None]
        self.drawn[rows] = 1
        self.uniform[rows, : uniform.shape[1]] = torch.from_numpy(uniform).to(token.device, non_blocking=True)

    def keep(self, count: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Rows `sources` take the places `targets`, with their keys and values; the first `count` go on."""
        self.cache.keep(count, sources, targets)
        if sources:
            index, into = (torch.tensor(rows, device=self.token.device) for rows in (sources, targets))
            for state in (self.token, self.position, self.drawn, self.uniform):
                state.index_copy_(0, into, state.index_select(0, index))
