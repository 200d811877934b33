"""A reward function in a thread of this process: what needs the trainer's own objects, and cannot be stopped.

A call over its time limit is left behind; its thread, a daemon, ends with the process. Pure Python work of several
functions takes turns, and what a function does to this process (its random state, its folder) stays done.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

from grpo_fast.rewards.user_function import FunctionError, Keywords, RewardFunction, described


class InThread:
    """One function, called as a `process.Worker` is."""

    def __init__(self, spec: str) -> None:
        """Loads the function; UserError where that is impossible."""
        self.spec = spec
        self._function = RewardFunction(spec)

    def ready(self) -> Keywords:
        """What the function takes."""
        return self._function.keywords

    def call(
        self, given: dict[str, list[Any]], count: int, known: Sequence[str] | None, limit_s: float
    ) -> dict[str, list[float]]:
        """As `Worker.call`, but for the death of the process."""
        finished: queue.SimpleQueue[dict[str, list[float]] | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                finished.put(self._function(given, count, known))
            except BaseException as error:  # SystemExit too: it would end the thread in silence
                finished.put(error)

        threading.Thread(target=work, name=f"reward {self.spec}", daemon=True).start()
        try:
            result = finished.get(timeout=limit_s)
        except queue.Empty:
            raise FunctionError(f"took longer than reward.timeout_s = {limit_s:g} s") from None
        if isinstance(result, FunctionError):
            raise result
        if isinstance(result, BaseException):
            raise FunctionError(f"raised {described(result)}") from result
        return result

    def close(self) -> None:
        """Nothing to end."""
