"""Generation in the training process, on the very weights that are trained: nothing to copy or to synchronise.

`run.py` schedules prompts and rows, `decoder.py` is one step of all rows, and the keys and values lie in one of the
caches of `grpo_fast.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_fast.attention.function import use_packed_attention
from grpo_fast.attention.group_cache import GroupCache
from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.decoder import Decoder
from grpo_fast.engines.run import Run
from grpo_fast.engines.stops import Decode
from grpo_fast.errors import UserError
from grpo_fast.models.head import HeadSpec, head_of

Progress = Callable[[int, int, int], None]
"""Called with (completions done, completions in all, tokens so far) after every step."""


class LocalEngine:
    """A `RolloutEngine` over a transformers model in place. Raises `UserError` for a model that cannot be
    packed.

    At most `max_rows` completions decode at once and at most `prefill_tokens` prompt tokens are prefilled at
    once (a longer prompt alone), so memory is bounded whatever is asked for. A completion depends on the
    weights, its prompt, the sampling and (seed, prompt index, sample index) alone, up to the rounding of
    matrix products of different sizes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_rows: int = 256,
        prefill_tokens: int = 16384,
        decode: Decode | None = None,
    ) -> None:
        """`decode` turns token ids into text; only stop strings need it."""
        if max_rows < 1:
            raise UserError(f"max_rows must be at least 1, got {max_rows}")
        self.model = use_packed_attention(model)
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.decode = decode
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
        if sampling.stop_strings and self.decode is None:
            raise UserError("stop_strings need the tokenizer: give the engine its decode")
        if not prompts:
            return []
        with _evaluating(self.model), torch.no_grad():
            run = self._run(head, prompts, n, sampling, seed)
            while run.unfinished:
                run.advance()
                if on_group is not None:
                    for prompt in run.take_whole():
                        on_group(prompt, [run.completion(prompt, s, self.version) for s in range(n)])
                if on_progress is not None:
                    on_progress(len(run.done), len(prompts) * n, run.tokens)
        return [run.completion(p, s, self.version) for p in range(len(prompts)) for s in range(n)]

    def _run(self, head: HeadSpec, prompts: list[list[int]], n: int, sampling: Sampling, seed: int) -> Run:
        rows = min(self.max_rows, len(prompts) * n)
        cache = GroupCache(rows, head.weight.device)
        decoder = Decoder(self.model, head, cache, max_rows=rows, max_new_tokens=sampling.max_new_tokens)
        return Run(
            decoder,
            lambda count: decoder.step(count, sampling).tolist,
            prompts,
            n,
            sampling,
            seed,
            max_rows=rows,
            prefill_tokens=self.prefill_tokens,
            layers=self.model.config.get_text_config(decoder=True).num_hidden_layers,
            decode=self.decode,
        )

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note the version; the weights are the trainer's own."""
        self.version = version

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def wake(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to release."""


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
