"""Around every engine: what comes back is looked at, what may pass is tried again, and the rest ends in one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from grpo_fast.data.records import one_line
from grpo_fast.engines.base import Completion, RolloutEngine, Sampling
from grpo_fast.engines.faults import EngineError
from grpo_fast.errors import UserError

PAUSE_S = 1.0  # before the first repetition; doubles with each further one
LONGEST_PAUSE_S = 30.0
ROUNDING = 1e-3  # a log-prob may be above 0 by this much

T = TypeVar("T")
OnGroup = Callable[[int, list[Completion]], None]


class Guard:
    """A `RolloutEngine` around another one.

    An engine outside this process has a method `recover` (and a `hint`, where to look). What fails there is tried
    again up to `retries` times, with the same seeds and with `weights()` handed over anew; `weights` must give those of
    the last `push`. Each prompt's group is reported once, whatever was repeated. UserError, in one line, when that was
    in vain.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        vocabulary: int,
        retries: int = 0,
        weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    ) -> None:
        self.engine = engine
        self._vocabulary, self._retries, self._weights = vocabulary, retries, weights
        self._version = 0
        self._pushed = False
        self._repeated = 0

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        places: Sequence[int] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Completion]:
        """`n` completions of every prompt, group-major, looked at; `on_group` as the engine itself calls it."""
        reported: set[int] = set()

        def look(prompt: int, group: list[Completion]) -> None:
            if prompt in reported:
                return
            self._check(prompt, group, n, sampling)
            if on_group is not None:
                on_group(prompt, group)
            reported.add(prompt)

        def attempt() -> list[Completion]:
            completions = self.engine.generate(prompts, n, sampling, seed, places=places, on_group=look)
            if len(completions) != len(prompts) * n:
                raise EngineError(
                    f"{len(completions)} completions came where {len(prompts) * n} were asked for"
                )
            for prompt in range(len(prompts)):
                self._check(prompt, completions[prompt * n : (prompt + 1) * n], n, sampling)
                if prompt not in reported:
                    raise EngineError(f"prompt {prompt} was never reported as finished")
            return completions

        return self._insist("a rollout", attempt)

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand new weights over; the same version again is not."""
        if self._pushed and version == self._version:
            return
        self._version, self._pushed = version, True
        first = [named_parameters]  # may be read once only

        def attempt() -> None:
            if first:
                self.engine.push(first.pop(), version)

        self._insist("the hand-over of the weights", attempt)

    def counts(self) -> dict[str, float]:
        """How often something was tried again since the start, as a metric; nothing for an engine in this process."""
        return {} if self._recovery() is None else {"engine/retries": float(self._repeated)}

    def sleep(self) -> None:
        """Give memory back until `wake`."""
        self.engine.sleep()

    def wake(self) -> None:
        """Be ready to generate again."""
        self.engine.wake()

    def close(self) -> None:
        """Release everything; the engine is not used again."""
        self.engine.close()

    def _insist(self, what: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, which follows on a recovery and on the hand-over of the weights when it failed."""
        recover = self._recovery()
        times = 1 + (self._retries if recover else 0)
        problem = ""
        for repetition in range(times):
            try:
                if repetition and recover is not None:
                    self._repeated += 1
                    time.sleep(min(PAUSE_S * 2 ** (repetition - 1), LONGEST_PAUSE_S))
                    recover()
                    assert self._weights is not None
                    self.engine.push(self._weights(), self._version)
                return attempt()
            except EngineError as error:
                problem = str(error)
            except FloatingPointError as error:  # of the weights in this process: nothing would change them
                raise UserError(
                    one_line(
                        f"engine: {error}; the policy's weights are damaged, a lower optim.lr may keep them well"
                    )
                ) from None
        often = f"{times} times (engine.retries = {self._retries})" if times > 1 else "and cannot be repeated"
        hint = getattr(self.engine, "hint", "")
        raise UserError(
            one_line(f"engine: {what} failed {often}, the last time: {problem}") + (hint and f"; {hint}")
        )

    def _recovery(self) -> Callable[[], None] | None:
        return getattr(self.engine, "recover", None)

    def _check(self, prompt: int, group: list[Completion], n: int, sampling: Sampling) -> None:
        if len(group) != n:
            raise EngineError(f"prompt {prompt}: {len(group)} completions came where {n} were asked for")
        for sample, completion in enumerate(group):
            if problem := fault(completion, sampling, version=self._version, vocabulary=self._vocabulary):
                raise EngineError(f"prompt {prompt}, sample {sample}: {problem}")


def fault(completion: Completion, sampling: Sampling, *, version: int, vocabulary: int) -> str:
    """What is wrong with a completion; empty: nothing."""
    tokens, logprobs = completion.token_ids, completion.logprobs
    if completion.version != version:
        return f"was drawn from weights {completion.version}, the policy's are {version}"
    if not tokens:
        return "has no token"
    if len(tokens) > sampling.max_new_tokens:
        return f"has {len(tokens)} tokens, more than max_new_tokens = {sampling.max_new_tokens}"
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        wrong = next(token for token in tokens if not 0 <= token < vocabulary)
        return (
            f"has token {wrong}, the policy's vocabulary ends at {vocabulary - 1}: is it the same tokenizer?"
        )
    if logprobs.shape != (len(tokens),):
        return f"has {len(tokens)} tokens and log-probs of shape {tuple(logprobs.shape)}"
    bad = ~torch.isfinite(logprobs) | (logprobs > ROUNDING)
    if bad.any():
        place = int(bad.nonzero()[0])
        return f"has log-prob {logprobs[place].item()} at token {place}"
    stops = set(sampling.stop_token_ids)
    if any(token in stops for token in tokens[:-1]):
        return "goes on after a stop token"
    if completion.finish_reason == "length":
        if tokens[-1] in stops:
            return "ends with a stop token and says it was cut"
        if len(tokens) != sampling.max_new_tokens:
            return f"was cut after {len(tokens)} tokens, not after max_new_tokens = {sampling.max_new_tokens}"
    elif tokens[-1] not in stops and not sampling.stop_strings:
        return "says it stopped and ends with no stop token"
    return ""
