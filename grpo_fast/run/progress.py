"""What one sees while a run goes on: a live display on a terminal, one plain line a step anywhere else."""

import itertools
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_fast.run.terminal import Terminal
from grpo_fast.shown import plain_text

PHASES = ("warm_start", "reward_model", "grpo")  # in the order a run goes through them
PHASE_TITLES = {"warm_start": "warm start", "reward_model": "reward model", "grpo": "GRPO"}
COLOURS = ["cyan", "magenta", "green", "yellow", "blue", "red"]  # of the objectives, in their order
_SPARKS = "▁▂▃▄▅▆▇█"


class Progress:
    """The display of a run, a context manager; it leaves the terminal as it was, whatever happens.

    `update` takes the same scalars that go into metrics.jsonl: `reward/<name>`, `loss`, `kl`, `tokens_per_s`,
    `memory_gib`; others are left to the report. On a terminal the display is redrawn in place; elsewhere each
    `update` prints exactly one line.
    """

    def __init__(self, objectives: Sequence[str] = (), *, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self.objectives = list(objectives)
        self.console = Terminal(file=self.file)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._phase, self._total, self._done_phases = "", 0, ""
        self._step, self._first_step, self._started = 0, 0, time.perf_counter()
        self._row: Mapping[str, Any] = {}
        self._curves: dict[str, Curve] = {}
        self._sample: tuple[str, str] | None = None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            self._live.__exit__(*exception)

    def phase(
        self, name: str, total: int, *, done: int = 0, earlier: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Begin a phase of `total` steps, of which a resumed run has `done` behind it, with these scalars."""
        self._phase, self._total, self._step, self._first_step = name, total, done, done
        self._started = time.perf_counter()
        self._row, self._curves = {}, {}
        for row in earlier:
            self._remember(row)
        self._redraw()

    def update(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Show step `step` (counted from 1) of the current phase."""
        self._step, self._row = step, scalars
        self._remember(scalars)
        if self._live:
            self._redraw()
        else:
            print(self._line(), file=self.file, flush=True)

    def _remember(self, scalars: Mapping[str, Any]) -> None:
        for name in self.objectives:
            value = scalars.get(f"reward/{name}")
            if isinstance(value, int | float) and math.isfinite(value):
                self._curves.setdefault(name, Curve()).add(float(value))

    def message(self, text: str) -> None:
        """One line above the display (or among the plain lines)."""
        text = plain_text(text, one_line=True)
        if self._live:
            self.console.print(Text(text))
        else:
            print(text, file=self.file, flush=True)

    def sample(self, prompt: str, completion: str) -> None:
        """Let the live display show this completion; plain output leaves it out."""
        self._sample = prompt, completion
        self._redraw()

    def _left(self) -> str:
        done = self._step - self._first_step
        if not done:
            return "–"
        return duration((time.perf_counter() - self._started) / done * (self._total - self._step))

    def _change(self, name: str) -> float:
        curve = self._curves.get(name)
        return curve.last - curve.first if curve else 0.0

    def _numbers(self) -> list[tuple[str, str]]:
        """(label, value) of what the last step measured besides the rewards."""
        row, shown = self._row, []
        for label, key, form in [("loss", "loss", "{:.4f}"), ("KL", "kl", "{:.4f}")]:
            if row.get(key) is not None:
                shown.append((label, form.format(row[key])))
        if row.get("tokens_per_s") is not None:
            shown.append(("tok/s", si(row["tokens_per_s"])))
        if row.get("memory_gib") is not None:
            shown.append(("GiB", f"{row['memory_gib']:.2f}"))
        return shown

    def _line(self) -> str:
        parts = [f"{self._phase} {self._step}/{self._total}"]
        parts += [
            f"{name} {self._row[key]:.3f} ({self._change(name):+.3f})"
            for name in self.objectives
            if self._row.get(key := f"reward/{name}") is not None
        ]
        parts += [f"{label} {value}" for label, value in self._numbers()]
        return "  ".join(plain_text(part, one_line=True) for part in [*parts, f"left {self._left()}"])

    def _redraw(self) -> None:
        if self._live:
            self._live.update(self._panel(), refresh=True)

    def _panel(self) -> Panel:
        parts: list[Any] = [heading(self._step, self._total, self._left())]
        curves = {name: self._curves[name].values() for name in self.objectives if name in self._curves}
        if curves:
            parts += [Text(), curve_table(curves, self.console.width)]
        if numbers := self._numbers():
            parts += [Text(), number_line(numbers)]
        if self._sample:
            parts += [Text(), *sample_lines(*self._sample)]
        return framed(PHASE_TITLES.get(self._phase, self._phase) or "starting", parts)


class Curve:
    """The values of one number so far, in the same room however many: neighbours are averaged as they become more."""

    MOST = 512

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self._means: list[float] = []
        self._each = 1
        """Values behind one mean"""
        self._sum, self._count = 0.0, 0
        """Of the values behind the next one"""

    def add(self, value: float) -> None:
        """The next value."""
        self.first = value if not (self._means or self._count) else self.first
        self.last = value
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._each:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) == self.MOST:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    def values(self) -> list[float]:
        """The first value, the means, and the last value; as they were where they were few."""
        return self._means if self._each == 1 else [self.first, *self._means, self.last]


def framed(title: str, parts: Sequence[Any]) -> Panel:
    """The parts below one another, in a frame."""
    shown = Text(plain_text(title, one_line=True), style="bold")
    return Panel(Group(*parts), title=shown, title_align="left", border_style="grey42", padding=(0, 1))


def heading(step: int, total: int, left: str) -> Table:
    """How far a phase is: step, a bar where `total` is known (above 0), the time left."""
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(
        total=max(total, 1),
        completed=step if total else 0,
        style="grey30",
        complete_style="cyan",
        finished_style="green",
    )
    head.add_row(
        Text(f"step {step}/{total}" if total else f"step {step}", style="bold"),
        bar,
        Text(f"{left} left", style="dim"),
    )
    return head


def curve_table(
    curves: Mapping[str, Sequence[float]], width: int, *, title: str = "reward", better: int = 1
) -> Table:
    """Name, last value, change since the first and a sparkline of every curve that has values.

    `width`: columns of the terminal; `better` -1: lower is better.
    """
    columns = 4 if width >= 48 else 2
    longest = max(4, width - (42 if columns == 4 else 16))
    shown = {_cut(plain_text(name, one_line=True), longest): v for name, v in curves.items() if v}
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    for _ in range(min(columns - 1, 2)):
        table.add_column(justify="right", no_wrap=True)
    if columns == 4:
        table.add_column(ratio=1, no_wrap=True, overflow="crop")
    table.add_row(*[Text(head, style="dim") for head in ("objective", title, "since start", "")[:columns]])
    room = max(8, width - max(map(len, shown), default=0) - 32)
    for index, (name, values) in enumerate(shown.items()):
        change = values[-1] - values[0]
        colour = COLOURS[index % len(COLOURS)]
        cells = (
            Text(name, style=colour),
            Text(f"{values[-1]:.3f}", style="bold"),
            Text(f"{change:+.3f}", style="green" if change * better > 0 else "red" if change else "dim"),
            Text(sparkline(values, room), style=colour),
        )
        table.add_row(*cells[:columns])
    return table


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def number_line(numbers: Sequence[tuple[str, str]]) -> Columns:
    """(label, value) pairs beside one another, as many as a line has room for."""
    pairs = [
        Text.assemble((f"{label} ", "dim"), value, no_wrap=True, overflow="crop") for label, value in numbers
    ]
    return Columns(pairs, padding=(0, 3))


def sample_lines(prompt: str, completion: str) -> list[Text]:
    """A prompt and its completion, a line each, whatever is in them."""
    return [
        Text(f"{mark} {plain_text(text, one_line=True)}", style="dim", no_wrap=True, overflow="ellipsis")
        for mark, text in zip("›‹", (prompt, completion), strict=True)
    ]


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as a line of block characters, averaged down to at most `width` of them."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(value / (b - a) for value in values[a:b]) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    if not 0 < span < math.inf:
        return _SPARKS[0] * len(means)
    return "".join(_SPARKS[min(7, int(8 * ((value - low) / span)))] for value in means)


def duration(seconds: float) -> str:
    """Seconds as "8 s", "3 min 05 s" or "2 h 07 min"."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def si(value: float) -> str:
    """Three digits and k, M or G: 12345 becomes "12.3k"."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"
