"""A run seen from another terminal, live: `python -m grpo_fast.watch RUN`.

It only reads the run's folder, so it may be started and stopped at any time, on any machine that sees the folder. On a
terminal the display is redrawn once a second; elsewhere each step is one plain line.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.follow import Standing, Tail, check_run_folder, number, settings_of, standing
from grpo_fast.run.progress import (
    PHASE_TITLES,
    PHASES,
    curve_table,
    duration,
    framed,
    heading,
    number_line,
    sample_lines,
    si,
)
from grpo_fast.run.terminal import Terminal, replace_unprintable
from grpo_fast.shown import plain_text
from grpo_fast.typed import is_dict

NUMBERS = (
    ("loss", "loss", "{:.4f}"),
    ("KL", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("grad norm", "grad_norm", "{:.3g}"),
    ("mismatch", "mismatch_mean", "{:.1e}"),
    ("length", "length_mean", "{:.0f}"),
    ("longest", "length_max", "{:.0f}"),
    ("cut", "truncated_frac", "{:.0%}"),
    ("no signal", "flat_groups_frac", "{:.0%}"),
    ("lr", "lr", "{:.1e}"),
    ("s/step", "time/step_s", "{:.3g}"),
    ("GiB", "memory_gib", "{:.2f}"),
)
"""(label, key of metrics.jsonl, form) of what is shown of the last step besides the rewards."""
COUNTED = {
    "skipped_updates": "updates skipped",
    "oom_retries": "out of memory, redone smaller",
    "engine/retries": "rollouts asked for again",
    "unscored": "completions without a score",
}
"""Things that should not happen, summed over the steps; those of a slash are logged as sums already."""
RECENT = 20
"""Steps whose seconds tell the time that is left."""
PATIENCE = 20
"""Times a usual step's seconds after which a run that writes nothing is called silent, a minute at least."""


class Watched:
    """What has been read of a run so far."""

    def __init__(self, folder: Path) -> None:
        """UserError where `folder` is not that of a run."""
        check_run_folder(folder)
        self.folder = folder
        self._metrics, self._samples = Tail(folder / "metrics.jsonl"), Tail(folder / "samples.jsonl")
        self._forget()
        self.sample: tuple[str, str] | None = None
        self._asked_steps = 0
        self.standing = standing(folder, patience_s=60.0)

    def _forget(self) -> None:
        self.phase, self.step = "", 0
        self.row: dict[str, Any] = {}
        self.history: dict[str, list[float]] = {}
        self.warnings: dict[str, int] = {}
        self.counted: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Steps of the phase, 0 where only the process that runs it knows."""
        return self._asked_steps if self.phase == PHASES[-1] else 0

    def look(self, each: Callable[[], None] = lambda: None) -> None:
        """Read on; `each` is called after every row. A resumed run's log begins anew, and all of it is read again."""
        run = settings_of(self.folder).get("run")
        steps = run.get("steps") if is_dict(run) else None
        self._asked_steps = steps if type(steps) is int and steps > 0 else 0
        # How it stands is asked first: what a run that has ended then logged last is read in this same look.
        self.standing = standing(self.folder, patience_s=max(60.0, PATIENCE * self._usual_s()))
        rows, anew = self._metrics.read()
        if anew:
            self._forget()
        for row in rows:
            if isinstance(row.get("phase"), str) and type(row.get("step")) is int:
                self._take(row)
                each()
        for sample in self._samples.read()[0]:
            prompt, completion = sample.get("prompt"), sample.get("completion")
            if isinstance(prompt, str) and isinstance(completion, str):
                self.sample = prompt, completion

    def _take(self, row: dict[str, Any]) -> None:
        if row["phase"] != self.phase:
            self._forget()
        self.phase, self.step, self.row = row["phase"], row["step"], row
        for key, value in row.items():
            if key.startswith("warning/"):
                self.warnings.setdefault(key.removeprefix("warning/"), self.step)
            if (plain := number(value)) is not None:
                self.history.setdefault(key, []).append(plain)
                if key in COUNTED:
                    self.counted[key] = round(plain) + (0 if "/" in key else self.counted[key])

    def _usual_s(self) -> float:
        recent = self.history.get("time/step_s", [])[-RECENT:]
        return statistics.fmean(recent) if recent else 0.0

    def left(self) -> str:
        """The time that is left of the phase, – where nobody knows."""
        if not self.total or not self._usual_s() or self.standing.over:
            return "–"
        since = min(self.standing.age_s, self._usual_s())
        return duration(max(0, self.total - self.step) * self._usual_s() - since)

    def curves(self, prefix: str) -> dict[str, list[float]]:
        """Name -> values of every metric with this prefix."""
        return {key.removeprefix(prefix): v for key, v in self.history.items() if key.startswith(prefix)}

    def numbers(self, keys: Sequence[tuple[str, str, str]] = NUMBERS) -> list[tuple[str, str]]:
        """(label, value) of what the last step measured besides the rewards."""
        found = [(label, number(self.row.get(key)), form) for label, key, form in keys]
        shown = [(label, form.format(value)) for label, value, form in found if value is not None]
        if (rate := number(self.row.get("tokens_per_s"))) is not None:
            shown.append(("tok/s", si(rate)))
        return shown

    def troubles(self) -> list[str]:
        """Warnings so far, with the step of each, and what was counted that should not happen."""
        warned = [f"{plain_text(name, one_line=True)} (step {step})" for name, step in self.warnings.items()]
        counted = [f"{COUNTED[key]}: {count}" for key, count in self.counted.items() if count]
        broken = [f"lines of metrics.jsonl that are no JSON: {self._metrics.broken}"]
        return [*warned, *counted, *(broken if self._metrics.broken else [])]

    def panel(self, width: int) -> Panel:
        """The display for a terminal of `width` columns."""
        parts: list[Any] = [heading(self.step, self.total, self.left())]
        if rewards := self.curves("reward/"):
            parts += [Text(), curve_table(rewards, width)]
        elif "loss" in self.history:
            losses = {"loss": self.history["loss"], **self.curves("loss/")}
            parts += [Text(), curve_table(losses, width, title="loss", better=-1)]
        if numbers := self.numbers():
            parts += [Text(), number_line(numbers)]
        if troubles := self.troubles():
            parts += [Text(), Text("warnings  " + "; ".join(troubles), style="yellow")]
        if self.sample:
            parts += [Text(), *sample_lines(*self.sample)]
        parts += [Text(), Text(told(self.standing), style=_STYLES[self.standing.state])]
        title = PHASE_TITLES.get(self.phase, self.phase) or "nothing logged yet"
        return framed(f"{self.folder.name}: {title}", parts)

    def line(self) -> str:
        """The last step in one plain line."""
        total = f"/{self.total}" if self.total else ""
        rewards = [f"{name} {values[-1]:.3f}" for name, values in self.curves("reward/").items()]
        numbers = [f"{label} {value}" for label, value in self.numbers()]
        parts = [f"{self.phase} {self.step}{total}", *rewards, *numbers, f"left {self.left()}"]
        return "  ".join(plain_text(part, one_line=True) for part in parts)


_STYLES = {"running": "dim", "silent": "yellow", "finished": "green", "stopped": "yellow", "failed": "red"}


def told(how: Standing) -> str:
    """How a run stands, as a sentence."""
    ago = duration(how.age_s)
    return {
        "running": f"running, last write {ago} ago",
        "silent": f"silent for {ago}: in a long evaluation, waiting, or killed",
        "finished": f"finished {ago} ago",
        "stopped": f"stopped {ago} ago, can be resumed",
        "failed": f"failed {ago} ago: {plain_text(how.why, one_line=True)}",
    }[how.state]


def follow(folder: Path, *, once: bool = False, every_s: float = 1.0, file: IO[str] | None = None) -> int:
    """Show the run until it is over or Ctrl-C is pressed; with `once` as it is now. Returns the exit code, 0.

    UserError where there is no run.
    """
    watched, console = Watched(folder), Terminal(file=file)
    replace_unprintable(console.file)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cursor comes back then, too
    try:
        if once:
            watched.look()
            console.print(watched.panel(console.width))
        elif console.is_terminal:
            _live(watched, console, every_s)
        else:
            _lines(watched, console.file, every_s)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _live(watched: Watched, console: Terminal, every_s: float) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            watched.look()
            live.update(watched.panel(console.width), refresh=True)
            if watched.standing.over:
                return
            time.sleep(every_s)


def _lines(watched: Watched, file: IO[str], every_s: float) -> None:
    """One line a step, those of steps that a resumed run keeps not twice; and a line where its standing changes."""
    printed: set[tuple[Any, ...]] = set()

    def show() -> None:
        place = watched.phase, watched.step, number(watched.row.get("time_s"))
        if place not in printed:
            print(watched.line(), file=file, flush=True)
        printed.add(place)

    state = "running"
    while True:
        watched.look(show)
        if watched.standing.state != state:
            print(told(watched.standing), file=file, flush=True)
        state = watched.standing.state
        if watched.standing.over:
            return
        time.sleep(every_s)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit code 0, or 2 after bad input."""
    run_command(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m grpo_fast.watch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run, whether it goes on or is over"
    )
    parser.add_argument("--once", action="store_true", help="show it as it is now, and stop")
    args = parser.parse_args(argv)
    return follow(args.run, once=args.once)


if __name__ == "__main__":
    main()
