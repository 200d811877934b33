"""A run's metrics, series by series: a step takes the same time and room however many there were before."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 5
"""Steps that are averaged."""
KEPT = 100
"""Latest values that can still be looked at."""

Row = Mapping[str, Any]
Values = list[tuple[int, float]]
"""(step, value)"""


def mean(values: Sequence[tuple[int, float]]) -> float:
    """Of the values; 0 where there are none."""
    return sum(value for _, value in values) / len(values) if values else 0.0


@dataclass
class Series:
    """The finite values of one metric: the first and the latest, and the extremes of all."""

    count: int = 0
    start: Values = field(default_factory=Values)
    """The first WINDOW"""
    latest: deque[tuple[int, float]] = field(default_factory=lambda: deque[tuple[int, float]](maxlen=KEPT))
    means: deque[float] = field(default_factory=lambda: deque[float](maxlen=WINDOW + 1))
    """Of each WINDOW values that follow on each other, the last ones"""
    lowest: deque[float] = field(default_factory=lambda: deque[float](maxlen=WINDOW + 1))
    """Of the means up to each of these"""
    highest: deque[tuple[float, int]] = field(
        default_factory=lambda: deque[tuple[float, int]](maxlen=WINDOW + 1)
    )
    """Of the means up to each of these, and the last step of its window; of equal ones the later"""

    def add(self, step: int, value: float) -> None:
        """The next value; steps are counted from 1."""
        self.count += 1
        if len(self.start) < WINDOW:
            self.start.append((step, value))
        self.latest.append((step, value))
        if self.count < WINDOW:
            return
        now = mean(self.last(WINDOW))
        self.means.append(now)
        self.lowest.append(min(now, self.lowest[-1]) if self.lowest else now)
        self.highest.append(max((now, step), self.highest[-1]) if self.highest else (now, step))

    def last(self, count: int) -> Values:
        """The latest values, at most `count` of the KEPT."""
        return [self.latest[place] for place in range(-min(count, len(self.latest)), 0)]


class History:
    """Rows of metrics, the first step first."""

    def __init__(self, rows: Iterable[Row] = (), *, weights: Mapping[str, float] | None = None) -> None:
        """`weights`: of the objectives in `progress`, negative where lower is better (default 1 each)."""
        self.steps = 0
        self.first: Row = {}
        self.last: Row = {}
        self.progress = Series()
        """Weighted mean of the objectives' rewards in each step, counted from the first WINDOW steps in standard
        deviations of their groups, so that objectives of any unit add up; from the second window on. An objective that
        was not scored in some step counts no more, and what is kept of the steps before is added up anew."""
        self._progress_of: list[str] = []
        self._weights = weights or {}
        self._series: defaultdict[str, Series] = defaultdict(Series)
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """The next step."""
        self.steps += 1
        self.first, self.last = self.first or row, row
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._series[key].add(self.steps, float(value))
        if self.steps >= 2 * WINDOW:
            self._go_on()

    def series(self, key: str) -> Series:
        """The values that were logged under `key`; none where there are none."""
        return self._series[key]

    def _go_on(self) -> None:
        """`progress` of this step; of all that are kept where it begins."""
        scales: dict[str, float] = {}
        for name in sorted(key.removeprefix("reward/") for key in self.first if key.startswith("reward/")):
            spread = [each for each in self.series(f"group_std/{name}").start if each[0] <= WINDOW]
            if self.series(f"reward/{name}").count == self.steps and (scale := mean(spread)) > 0:
                scales[name] = scale
        if list(scales) != self._progress_of:
            self.progress, self._progress_of = Series(), list(scales)
        weights = {name: self._weights.get(name, 1.0) for name in scales}
        total = sum(map(abs, weights.values()))
        if not total:
            self.progress = Series()
            return
        latest = {name: self.series(f"reward/{name}") for name in scales}
        behind = 1 if self.progress.count else min(self.steps, KEPT)
        for back in range(behind, 0, -1):
            moved = sum(
                weights[name] * (latest[name].latest[-back][1] - mean(latest[name].start)) / scale
                for name, scale in scales.items()
            )
            self.progress.add(self.steps - back + 1, moved / total)
