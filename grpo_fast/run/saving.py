"""Saving beside training: one thread writes what was copied, and its failure is told at the next opportunity."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Saver:
    """Writes one thing after the other in a thread; with `aside` False in the caller's own."""

    def __init__(self, *, aside: bool) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save") if aside else None
        self._running: Future[None] | None = None

    @property
    def is_aside(self) -> bool:
        """Whether training goes on while something is written."""
        return self._thread is not None

    def write(self, work: Callable[[], None]) -> None:
        """Begin `work` as soon as the one before is through; raises what that one failed with."""
        self.wait()
        if self._thread is None:
            work()
        else:
            self._running = self._thread.submit(work)

    def failed(self) -> bool:
        """Whether the last work has ended with an error, which `wait` will raise."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def wait(self) -> None:
        """Until everything is written; raises what it failed with, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, whatever the outcome, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
