"""Which prompts a step takes: every one once an epoch, and seldom those whose groups lately gave no signal."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from grpo_fast.errors import UserError

LARGEST = 2**53
"""Of the whole numbers that JSON's floating point keeps apart"""


class PromptQueue:
    """An endless order of `n` prompts, new each epoch; a pure function of the seed and of what was recorded.

    A prompt whose group was flat (all its completions scored alike) is passed over the next time it comes up, twice
    in a row after the second flat group, and at most `rest` times: what is solved, or out of reach, is asked less
    often and never forgotten. `rest` 0 passes nothing over.

    `state` is what a checkpoint carries: the place in the order, and `flat/<prompt>` and `rest/<prompt>`. It changes
    with `settle` alone, so that prompts taken for a batch which is still under way are taken again after a resume.
    """

    def __init__(self, n: int, seed: int, *, rest: int = 0, state: dict[str, float] | None = None) -> None:
        self._n, self._seed, self._rest = n, seed, rest
        self.state: dict[str, float] = {} if state is None else state
        self.taken = self.state

    def take(self, count: int) -> list[int]:
        """The next `count` prompts; an epoch may end among them."""
        taken: list[int] = []
        place = int(self._now.get("place", 0))
        while len(taken) < count:
            prompt = int(_permutation(self._n, self._seed, place // self._n)[place % self._n])
            place += 1
            if left := self._now.pop(f"rest/{prompt}", 0):
                self._now |= {f"rest/{prompt}": left - 1} if left > 1 else {}
            else:
                taken.append(prompt)
        self._now["place"] = place
        return taken

    def record(self, prompts: Sequence[int], flat: Sequence[bool]) -> None:
        """Note which of the prompts taken had a group without signal."""
        if not self._rest:
            return
        for prompt, without_signal in zip(prompts, flat, strict=True):
            times = self._now.pop(f"flat/{prompt}", 0) + 1
            self._now.pop(f"rest/{prompt}", None)
            if without_signal:
                self._now |= {f"flat/{prompt}": times, f"rest/{prompt}": min(times, self._rest)}

    @property
    def taken(self) -> dict[str, float]:
        """`state` as `settle` would make it now."""
        return dict(self._now)

    @taken.setter
    def taken(self, state: dict[str, float]) -> None:
        for name, number in state.items():
            kind, _, prompt = name.partition("/")
            most = {"place": LARGEST, "flat": LARGEST, "rest": self._rest}.get(kind, -1)
            known = not prompt if kind == "place" else prompt.isdecimal() and int(prompt) < self._n
            if not (known and 0 <= number <= most and number == int(number)):
                raise UserError(
                    f"the run's place among its {self._n} prompts is damaged ({name} = {number!r}): its checkpoint was "
                    "put together by something else"
                )
        self._now = dict(state)

    def settle(self) -> None:
        """Everything taken so far has been used: it becomes part of `state`."""
        self.state.clear()
        self.state.update(self._now)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
