"""What a rollout engine takes and gives: the seam between the loop and whatever generates the completions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from grpo_fast.config.settings import RolloutSettings
from grpo_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn. Raises `UserError` for a value out of range."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token"""
    max_new_tokens: int = 64
    """A completion ends after this many tokens at the latest"""
    top_k: int = 0
    """Only the k most likely tokens (0: all)"""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability (1: all)"""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the most likely one (0: all)"""
    stop_token_ids: tuple[int, ...] = ()
    """A completion ends with the first of these tokens, which belongs to it"""
    stop_strings: tuple[str, ...] = ()
    """A completion ends with the token that completes the first of these texts; both belong to it"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie between 0 and 1, got {self.min_p}")
        if not all(self.stop_strings):
            raise UserError("stop_strings must not hold an empty text")

    @classmethod
    def of(cls, settings: RolloutSettings, stop_token_ids: Iterable[int]) -> Sampling:
        """A run's settings, and every token that ends a completion."""
        return cls(
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            stop_token_ids=tuple(stop_token_ids),
            stop_strings=settings.stop_strings,
        )

    @property
    def truncates(self) -> bool:
        """Whether some tokens are made impossible, which biases the ratio unless it is corrected for."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]
    """At least one token; when `finish_reason` is "stop", the last one is a stop token or completes a stop string"""
    logprobs: Tensor
    """(len(token_ids),) float32 on the CPU: log-prob of each token under the distribution it was drawn from,
    that is after temperature *and* truncation. This is the denominator that importance weights against the
    trainer's distribution need. Greedy completions report the model's own log-probs (temperature 1)."""
    finish_reason: Literal["stop", "length"]
    version: int
    """Version of the weights, as last given to `push`"""


class RolloutEngine(Protocol):
    """Turns prompts into completions with the latest weights."""

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
        """`n` completions of every prompt, group-major: exactly len(prompts)·n, or an exception.

        `places` are the prompts' numbers where random numbers are drawn from (seed, number, sample): a batch that is
        generated in parts gives what it gives as a whole. None: 0, 1, 2, …

        `on_group(prompt, completions)` is called as soon as a prompt's completions are all there, in an order that
        depends on the completions alone.
        """
        ...

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over new weights; completions carry `version` from now on."""
        ...

    def sleep(self) -> None:
        """Give memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Be ready to generate again."""
        ...

    def close(self) -> None:
        """Release everything; the engine is not used again."""
        ...


def places_of(prompts: Sequence[object], places: Sequence[int] | None) -> Sequence[int]:
    """The number of each prompt that its random numbers are drawn from."""
    if places is None:
        return range(len(prompts))
    if len(places) != len(prompts):
        raise ValueError(f"places must have one number for each of {len(prompts)} prompts, got {len(places)}")
    return places


def check_request(prompts: list[list[int]], n: int, vocabulary: int) -> None:
    """UserError for no completions, an empty prompt, and a token that is none of `vocabulary`."""
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
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode inside; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
