"""The run as a process sees it that writes nothing: every one but the first."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class SilentLogger:
    """Takes what a `RunLogger` takes, and leaves no trace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phase_s: dict[str, float] = {}

    def __enter__(self) -> "SilentLogger":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def step(self, phase: str, step: int, scalars: Mapping[str, Any]) -> dict[str, Any]:
        """The row that the first process logs, without its clocks."""
        return {"phase": phase, "step": step, **scalars}

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    @contextmanager
    def phase_timer(self, name: str) -> Iterator[None]:
        """Seconds of the block, for this process alone."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.phase_s[name] = self.phase_s.get(name, 0.0) + time.perf_counter() - started
