"""A run while it goes on: its folder, its display, and the wish to stop it."""

import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from grpo_fast.errors import Stopped
from grpo_fast.parallel.world import ALONE, World
from grpo_fast.run.follow import note_ending
from grpo_fast.run.metrics import RunLogger, peak_memory_gib, read_rows
from grpo_fast.run.progress import Progress
from grpo_fast.run.silent import SilentLogger

TOGETHER = "grpo"
"""The phase that all processes go through; before it the first one works alone."""


class Closable(Protocol):
    """Something that must be closed."""

    def close(self) -> None: ...


Closed = TypeVar("Closed", bound=Closable)


def run_to_the_end(
    logger: RunLogger | SilentLogger, module: str, body: Callable[["Run"], int], *, world: World = ALONE
) -> int:
    """Call `body` with the run; its exit code, or 130 when a signal stopped it, with the way to go on."""
    with Run(logger, world=world) as run:
        try:
            return body(run)
        except Stopped:
            if world.is_first:
                note_ending(run.path)
            run.progress.message(f"stopped; go on with: python -m {module} --resume {run.path}")
            return 130


def opened(world: World, make: Callable[[], RunLogger]) -> RunLogger | SilentLogger:
    """The logger that `make` gives on the first process, and silent ones for the same folder on the others."""
    made: list[RunLogger] = []

    def on_first() -> str:
        made.append(make())
        return str(made[0].path)

    path = world.first(on_first)
    return made[0] if made else SilentLogger(Path(path))


class Run:
    """Logs and shows every step. After the first SIGINT or SIGTERM `stop_requested` turns true with the next `listen`.

    A second signal interrupts at once. On several processes the first one logs and shows, and a signal that reached
    one of them stops all after the same step. Use as a context manager.
    """

    def __init__(self, logger: RunLogger | SilentLogger, *, world: World = ALONE):
        self.path: Path = logger.path
        self.logger = logger
        self.world = world
        self.progress = Progress(file=None if world.is_first else StringIO())
        self.phase_timer = logger.phase_timer
        self._signalled = 0.0  # when
        self._stopping = False
        self._phase = ""
        self._stack = ExitStack()

    def __enter__(self) -> "Run":
        self._stack.enter_context(self.logger)
        self._stack.enter_context(self.progress)
        self._stack.enter_context(self._signals())
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)

    @property
    def stop_requested(self) -> bool:
        """Whether the run is to end where it is, on all its processes.

        Does not change between one `listen` and the next: whoever saves because of it and whoever stops because of it
        see the same.
        """
        return self._stopping

    def listen(self) -> None:
        """Take note of a signal that has come since, on any process of a phase that all go through."""
        signalled = self._signalled > 0
        self._stopping = self.world.any(signalled) if self._phase == TOGETHER else signalled

    def closing(self, thing: Closed) -> Closed:
        """`thing`, which is closed when the run ends, however it ends."""
        return self._stack.enter_context(closing(thing))

    def begin(self, phase: str, steps: int, *, done: int = 0, objectives: Sequence[str] = ()) -> None:
        """Start showing a phase of `steps` steps, `done` of which an earlier process took, and `listen`."""
        self._phase = phase
        self.listen()
        self.progress.objectives = list(objectives)
        earlier = (
            [row for row in self.rows() if row["phase"] == phase and row["step"] <= done] if done else []
        )
        self.progress.phase(phase, steps, done=done, earlier=earlier)

    def step(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Log and show step `step` (from 1) of the current phase, and `listen`."""
        scalars = {**scalars, "memory_gib": round(peak_memory_gib(), 3)}
        if self.world.size > 1 and self._phase == TOGETHER:  # a full disk is everybody's
            row = self.world.first(lambda: self.logger.step(self._phase, step, scalars))
        else:
            row = self.logger.step(self._phase, step, scalars)
        self.progress.update(step, row)
        self.listen()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Completions of an evaluation that all processes have made, for samples.jsonl."""
        self.world.first(lambda: self.logger.samples(rows))

    def rows(self) -> list[dict[str, Any]]:
        """Every step logged so far, those before a resume included."""
        return read_rows(self.path / "metrics.jsonl")

    def check_stop(self) -> None:
        """Raise `Stopped` when a signal has asked for it: called where nothing half-done would be lost."""
        if self.stop_requested:
            raise Stopped

    @contextmanager
    def _signals(self) -> Generator[None, None, None]:
        def request(number: int, _: FrameType | None) -> None:
            now = time.monotonic()
            if self._signalled:
                # a launcher passes on what the terminal has sent already
                if self.world.size == 1 or now - self._signalled > 2.0:
                    raise KeyboardInterrupt
                return
            self._signalled = now
            name = signal.Signals(number).name
            self.progress.message(
                f"{name}: stopping after this step, everything is saved; once more stops at once"
            )

        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
