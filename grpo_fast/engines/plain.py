"""Generation for models the built-in engine cannot decode: `transformers`' own `generate`, a prompt at a time.

Recurrent and convolution layers carry padding along, so there is none: the completions of one prompt are a batch of
rows of one length. Tokens are drawn as the built-in engine draws them, inside `generate`, which keeps whatever cache
the architecture has; log-probs come from one forward pass of each finished sequence, as in training.

Letters: B rows, V vocabulary, N tokens of a completion, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
import torch
from grpo_kernels import linear_logprob
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from grpo_fast.engines.base import Completion, Sampling, check_request, evaluating, places_of
from grpo_fast.engines.sampling import draw, uniforms
from grpo_fast.errors import UserError
from grpo_fast.models.head import head_of


class PlainEngine:
    """A `RolloutEngine` over `model.generate`, at most `max_rows` completions of one prompt at once.

    A completion depends on the weights, its prompt, the sampling and (seed, prompt index, sample index) alone, up to
    the rounding of matrix products of different sizes.
    """

    def __init__(self, model: PreTrainedModel, *, max_rows: int = 256) -> None:
        if max_rows < 1:
            raise UserError(f"max_rows must be at least 1, got {max_rows}")
        self.model = model
        self.max_rows = max_rows
        self.version = 0

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        places: Sequence[int] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """`n` completions of every prompt, group-major; `on_group` sees each group as soon as it is whole.

        Raises `UserError` for an empty prompt, `FloatingPointError` for logits that are no distribution.
        """
        check_request(prompts, n, head_of(self.model).weight.shape[0])
        if sampling.stop_strings:
            raise UserError(
                "stop_strings: this model runs one sequence a row, where only tokens end a completion"
            )
        completions: list[Completion] = []
        with evaluating(self.model), torch.no_grad():
            for i, (place, prompt) in enumerate(zip(places_of(prompts, places), prompts, strict=True)):
                group: list[Completion] = []
                for first in range(0, n, self.max_rows):
                    samples = range(first, min(first + self.max_rows, n))
                    streams = np.stack([uniforms(seed, place, s, sampling.max_new_tokens) for s in samples])
                    group += self._complete(prompt, i, streams, sampling)
                completions += group
                if on_group is not None:
                    on_group(i, group)
        return completions

    def _complete(
        self,
        prompt: list[int],
        index: int,
        streams: np.ndarray,  # (B, max_new_tokens)
        sampling: Sampling,
    ) -> list[Completion]:
        """One completion for each stream of uniform numbers."""
        device = self.model.device
        drawing = _Draw(torch.from_numpy(streams).to(device), sampling)
        ids = torch.tensor([prompt] * len(streams), device=device)
        stops = sorted(sampling.stop_token_ids)
        out = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=stops or None,
                pad_token_id=0,
            ),
            logits_processor=LogitsProcessorList([drawing]),
        )
        rows = cast(Tensor, out)[:, len(prompt) :].tolist()
        drawn = torch.stack(drawing.logprobs, 1).cpu()  # (B, tokens generated)
        found = []
        for row, logprobs in zip(rows, drawn, strict=True):
            end = next((t + 1 for t, token in enumerate(row) if token in stops), len(row))
            tokens = row[:end]
            exact = logprobs[:end].float() if sampling.truncates else self._logprobs(prompt, tokens, sampling)
            if not bool(exact.isfinite().all()):
                raise FloatingPointError(
                    f"the model's logits are not finite after prompt {index}: weights with NaN or inf?"
                )
            reason = "stop" if tokens[-1] in stops else "length"
            found.append(
                Completion(token_ids=tokens, logprobs=exact, finish_reason=reason, version=self.version)
            )
        return found

    def _logprobs(self, prompt: list[int], tokens: list[int], sampling: Sampling) -> Tensor:
        """(N,) float32 on the CPU: of a finished completion, at the sampling temperature (greedy: 1)."""
        row = torch.tensor([prompt + tokens[:-1]], device=self.model.device)
        base = cast(nn.Module, self.model.base_model)
        hidden = base(input_ids=row, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]  # (N, H)
        head = head_of(self.model)
        logprobs, _ = linear_logprob(
            hidden,
            head.weight,
            targets=torch.tensor(tokens, device=hidden.device),
            temperature=sampling.temperature or 1.0,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        return logprobs.cpu()

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note the version; the weights are the trainer's own."""
        self.version = version

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def wake(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to release."""


class _Draw(LogitsProcessor):
    """Draws the next token from each row's own stream, and leaves `generate` no other choice."""

    def __init__(self, streams: Tensor, sampling: Sampling) -> None:
        self.streams = streams  # (B, max_new_tokens) float64
        self.sampling = sampling
        self.logprobs: list[Tensor] = []  # (B,) float64 each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.streams[:, len(self.logprobs)]
        token, logprob = draw(scores.float().clone(), uniform, self.sampling)
        self.logprobs.append(logprob)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)
