"""What a run warned of, and at which steps of which charts that is marked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_fast.trust.limits import passed
from grpo_fast.trust.watch import Watch, metrics_of

Marks = Mapping[str, Sequence[int]]
"""Metric, or what metrics' names begin with -> steps at which something was said of it."""


def warnings_of(
    rows: Sequence[Mapping[str, Any]], objectives: Mapping[str, Mapping[str, Any]]
) -> list[tuple[int, str, str]]:
    """(step, name, what was said) of everything the run warned of, by step; `objectives` are its summary's."""
    watch = Watch(weights={name: objective.get("weight") or 0.0 for name, objective in objectives.items()})
    plain = [{key: value for key, value in row.items() if not key.startswith("warning/")} for row in rows]
    found = [(row["step"], name, text) for row in plain for name, text in watch.step(row).items()]
    return sorted([*found, *passed(rows)], key=lambda warning: warning[0])


def marks_of(warnings: Sequence[tuple[int, str, str]]) -> Marks:
    """The steps of the warnings, by metric."""
    marks: dict[str, list[int]] = {}
    for step, name, _ in warnings:
        for metric in metrics_of(name):
            marks.setdefault(metric, []).append(step)
    return marks


def steps_of(marks: Marks, metrics: Iterable[str]) -> list[int]:
    """Steps to be marked in a chart of these metrics."""
    return sorted({step for metric in metrics for step in marks.get(metric, ())})
