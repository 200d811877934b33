"""Generation in the training process, on the very weights that are trained: nothing to copy or to
synchronise.

Prompts are prefilled packed, each once for all its completions. Rows decode together in a KV cache of their
own; a row that ends makes room at once, so ended completions cost nothing, and waiting ones take the free
places.

Letters: B rows decoding, V vocabulary, P prompts of a prefill.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_fast.attention.function import use_packed_attention
from grpo_fast.attention.plan import DecodePlan, PackedPlan, PrefillPlan
from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.sampling import draw, uniforms
from grpo_fast.errors import UserError
from grpo_fast.models.head import HeadSpec, head_of

Progress = Callable[[int, int, int], None]
"""Called with (completions done, completions in all, tokens so far) after every step."""


@dataclass
class _Row:
    """A completion under way."""

    prompt: int
    sample: int
    uniform: np.ndarray  # (max_new_tokens,) float64
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalEngine:
    """A `RolloutEngine` over a transformers model in place. Raises `UserError` for a model that cannot be
    packed.

    At most `max_rows` completions decode at once and at most `prefill_tokens` prompt tokens are prefilled at
    once (a longer prompt alone), so memory is bounded whatever is asked for. A completion depends on the
    weights, its prompt, the sampling and (seed, prompt index, sample index) alone, up to the rounding of
    matrix products of different sizes.
    """

    def __init__(self, model: PreTrainedModel, *, max_rows: int = 256, prefill_tokens: int = 16384) -> None:
        if max_rows < 1:
            raise UserError(f"max_rows must be at least 1, got {max_rows}")
        self.model = use_packed_attention(model)
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.version = 0

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        on_progress: Progress | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """`n` completions of every prompt, group-major; `on_group` sees each group as soon as it is whole.

        Raises `UserError` for an empty prompt or a token outside the vocabulary, `FloatingPointError` when
        the model returns logits that are no distribution.
        """
        head = head_of(self.model)
        _check(prompts, n, head.weight.shape[0])
        with _evaluating(self.model), torch.no_grad():
            run = _Run(self.model, head, prompts, n, sampling, seed, self.max_rows, self.prefill_tokens)
            while run.waiting or run.rows:
                if run.should_admit():
                    run.admit()
                else:
                    run.step()
                if on_group is not None:
                    for prompt in run.take_whole(n):
                        on_group(prompt, [run.completion(prompt, s, self.version) for s in range(n)])
                if on_progress is not None:
                    on_progress(len(run.done), len(prompts) * n, run.tokens)
        return [run.completion(p, s, self.version) for p in range(len(prompts)) for s in range(n)]

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note the version; the weights are the trainer's own."""
        self.version = version

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def wake(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to release."""


class _Run:
    """The state of one `generate` call: completions waiting, decoding and done."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: HeadSpec,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        max_rows: int,
        prefill_tokens: int,
    ) -> None:
        self.base = model.base_model
        self.layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.head = head
        self.prompts = prompts
        self.sampling = sampling
        self.stops = frozenset(sampling.stop_token_ids)
        self.seed = seed
        self.device = head.weight.device
        self.max_rows = min(max_rows, len(prompts) * n)
        self.prefill_tokens = prefill_tokens
        self.waiting = deque((p, s) for p in range(len(prompts)) for s in range(n))
        self.rows: list[_Row] = []
        self.done: dict[tuple[int, int], _Row] = {}
        self.ended: list[int] = []  # the prompts of the completions that ended since `take_whole`
        self.ended_of: Counter[int] = Counter()
        self.tokens = 0
        self.cache = DecodePlan(self.max_rows)
        self.uniform = torch.zeros(
            self.max_rows, sampling.max_new_tokens, dtype=torch.float64, device=self.device
        )
        self.next_token = torch.zeros(0, 1, dtype=torch.int64, device=self.device)  # (B, 1)
        self.length = torch.zeros(0, dtype=torch.int64, device=self.device)  # (B,) tokens already cached
        self.drawn = torch.zeros(0, 1, dtype=torch.int64, device=self.device)  # (B, 1) tokens already drawn

    def should_admit(self) -> bool:
        """Prefill when it fills a good part of the places at once; a prefill for every free place is slow."""
        free = self.max_rows - len(self.rows)
        return bool(self.waiting) and (
            not self.rows or free >= min(len(self.waiting), -(-self.max_rows // 4))
        )

    def admit(self) -> None:
        """Prefill the next prompts, draw the first token of their completions and give them rows."""
        fresh: list[_Row] = []
        used: list[int] = []  # prompts, in the order of the prefill
        total = 0
        while self.waiting and len(self.rows) + len(fresh) < self.max_rows:
            prompt, sample = self.waiting[0]
            if not used or used[-1] != prompt:
                if used and total + len(self.prompts[prompt]) > self.prefill_tokens:
                    break
                used.append(prompt)
                total += len(self.prompts[prompt])
            self.waiting.popleft()
            uniform = uniforms(self.seed, prompt, sample, self.sampling.max_new_tokens)
            fresh.append(_Row(prompt, sample, uniform))
        lengths = [len(self.prompts[p]) for p in used]
        plan = PrefillPlan.of_lengths(lengths, self.device)
        ids = torch.tensor([[token for p in used for token in self.prompts[p]]], device=self.device)
        positions = torch.tensor([[i for length in lengths for i in range(length)]], device=self.device)
        last = torch.tensor(plan.q_starts[1:], device=self.device) - 1
        hidden = self._forward(ids, positions, plan)[0, last]  # (P, H)
        if len(plan.kept) != self.layers:
            name = type(self.base).__name__
            raise UserError(
                f"{name}: {len(plan.kept)} of {self.layers} layers pass their keys to the attention"
            )
        place = {prompt: i for i, prompt in enumerate(used)}
        which = torch.tensor([place[row.prompt] for row in fresh], device=self.device)
        uniform = torch.from_numpy(np.stack([row.uniform for row in fresh])).to(self.device)
        token, logprob = draw(self.head.logits(hidden)[which], uniform[:, 0], self.sampling)
        alive = self._record(fresh, token, logprob)
        self._give_rows([fresh[i] for i in alive], which[alive], token[alive], uniform[alive], lengths, plan)

    def _give_rows(
        self,
        fresh: list[_Row],
        which: Tensor,  # (R,) place of each row's prompt in the prefill
        token: Tensor,  # (R,)
        uniform: Tensor,  # (R, max_new_tokens)
        lengths: list[int],
        plan: PrefillPlan,
    ) -> None:
        if not fresh:
            return
        rows = torch.arange(len(self.rows), len(self.rows) + len(fresh), device=self.device)
        start = torch.tensor(plan.q_starts[:-1], device=self.device)[which]
        length = torch.tensor(lengths, device=self.device)[which]
        widest = max(len(self.prompts[row.prompt]) for row in fresh)
        slot = torch.minimum(torch.arange(widest, device=self.device), length[:, None] - 1)
        self.cache.admit(rows, start[:, None] + slot, plan)
        self.uniform[rows] = uniform
        self.next_token = torch.cat([self.next_token, token[:, None]])
        self.length = torch.cat([self.length, length])
        self.drawn = torch.cat([self.drawn, torch.ones_like(token)[:, None]])
        self.rows.extend(fresh)

    def step(self) -> None:
        """One more token for every row."""
        span = max(len(self.prompts[row.prompt]) + len(row.tokens) for row in self.rows)
        self.cache.begin(self.length, span)
        hidden = self._forward(self.next_token, self.length[:, None], self.cache)[:, 0]  # (B, H)
        uniform = self.uniform[: len(self.rows)].gather(1, self.drawn)[:, 0]
        token, logprob = draw(self.head.logits(hidden), uniform, self.sampling)
        self.next_token = token[:, None]
        self.length = self.length + 1
        self.drawn = self.drawn + 1
        alive = self._record(self.rows, token, logprob)
        if len(alive) < len(self.rows):
            self._close_ranks(alive)

    def _close_ranks(self, alive: list[int]) -> None:
        """Move the last rows into the places of those that ended, so the rows in use stay the first ones."""
        count = len(alive)
        staying = set(alive)
        holes = [i for i in range(count) if i not in staying]
        tails = [i for i in alive if i >= count]
        order = list(range(count))
        for hole, tail in zip(holes, tails, strict=True):
            order[hole] = tail
        if holes:
            targets = torch.tensor(holes, device=self.device)
            sources = torch.tensor(tails, device=self.device)
            self.cache.move(sources, targets)
            self.uniform[targets] = self.uniform[sources]
        index = torch.tensor(order, dtype=torch.int64, device=self.device)
        self.next_token = self.next_token[index]
        self.length = self.length[index]
        self.drawn = self.drawn[index]
        self.rows = [self.rows[i] for i in order]

    def _forward(self, ids: Tensor, positions: Tensor, plan: PackedPlan | DecodePlan) -> Tensor:
        return self.base(
            input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, plan=plan
        ).last_hidden_state

    def _record(self, rows: list[_Row], token: Tensor, logprob: Tensor) -> list[int]:
        """Append what was drawn; returns the rows that go on. This is the step's only synchronisation."""
        tokens, logprobs = torch.stack([token.double(), logprob]).tolist()
        self.tokens += len(rows)
        limit = self.sampling.max_new_tokens
        alive = []
        for i, row in enumerate(rows):
            if not math.isfinite(logprobs[i]):
                where = f"token {len(row.tokens)} of prompt {row.prompt}, sample {row.sample}"
                raise FloatingPointError(
                    f"the model's logits are not finite at {where}: weights with NaN or inf?"
                )
            row.tokens.append(int(tokens[i]))
            row.logprobs.append(logprobs[i])
            if row.tokens[-1] in self.stops or len(row.tokens) == limit:
                self.done[row.prompt, row.sample] = row
                self.ended.append(row.prompt)
            else:
                alive.append(i)
        return alive

    def take_whole(self, n: int) -> list[int]:
        """Prompts whose `n` completions have all ended, each reported once."""
        self.ended_of.update(self.ended)
        whole = [prompt for prompt in dict.fromkeys(self.ended) if self.ended_of[prompt] == n]
        self.ended = []
        return whole

    def completion(self, prompt: int, sample: int, version: int) -> Completion:
        """The finished completion (prompt, sample)."""
        row = self.done[prompt, sample]
        return Completion(
            token_ids=row.tokens,
            logprobs=torch.tensor(row.logprobs, dtype=torch.float32),
            finish_reason="stop" if row.tokens[-1] in self.stops else "length",
            version=version,
        )


def _check(prompts: list[list[int]], n: int, vocabulary: int) -> None:
    if n < 1:
        raise UserError(f"n, the completions per prompt, must be at least 1, got {n}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: generation needs at least one token to start from")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocabulary:
            raise UserError(
                f"prompt {i} has token {low if low < 0 else high}, the vocabulary ends at {vocabulary - 1}"
            )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
