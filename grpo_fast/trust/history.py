"""A run's metrics, series by series: a step is added in the same time however many there were before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 5
"""Steps that are averaged."""

Row = Mapping[str, Any]
Values = list[tuple[int, float]]
"""(step, value)"""


def mean(values: Sequence[tuple[int, float]]) -> float:
    """Of the values; 0 where there are none."""
    return sum(value for _, value in values) / len(values) if values else 0.0


@dataclass
class Series:
    """The finite values of one metric, and what is asked of all of them again and again."""

    values: Values = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    """Of each WINDOW values that follow on each other"""
    lowest: list[float] = field(default_factory=list)
    """Of the means so far"""
    highest: list[tuple[float, int]] = field(default_factory=list)
    """Of the means so far, and how many values there were; of equal ones the later"""

    def add(self, step: int, value: float) -> None:
        """The next value; steps are counted from 1."""
        self.values.append((step, value))
        if len(self.values) < WINDOW:
            return
        self.means.append(mean(self.values[-WINDOW:]))
        here = (self.means[-1], len(self.values))
        self.lowest.append(min(self.means[-1], self.lowest[-1]) if self.lowest else self.means[-1])
        self.highest.append(max(here, self.highest[-1]) if self.highest else here)


class History:
    """Rows of metrics, the first step first."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.steps = 0
        self.first: Row = {}
        self.last: Row = {}
        self._series: dict[str, Series] = {}
        self.progress = Series()
        """See `degeneration.progress`, which keeps it"""
        self.progress_of: tuple[str, ...] = ()
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """The next step."""
        self.steps += 1
        self.first, self.last = self.first or row, row
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._series.setdefault(key, Series()).add(self.steps, float(value))

    def series(self, key: str) -> Series:
        """The values that were logged under `key`; none where there are none."""
        return self._series.get(key, Series())
