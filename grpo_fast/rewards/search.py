"""Which rows of a batch a function fails on: found by halving the batch, within a bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from grpo_fast.rewards.user_function import FunctionError

SEARCH_TIMES = 4.0
"""The search takes at most about this many time limits of one batch."""
SHORTEST_LIMIT_S = 1.0
"""Parts of a batch have less time than the whole, but not less than this (or the whole's limit, if that is less)."""


@dataclass
class Found:
    """What a search has found."""

    rows: dict[int, FunctionError] = field(default_factory=dict)
    """Rows that fail alone, and how"""
    undecided: list[int] = field(default_factory=list)
    """Rows that there was no time to try"""


def failing_rows(
    attempt: Callable[[list[int], float], FunctionError | None],
    count: int,
    *,
    limit_s: float,
    first_only: bool,
) -> Found:
    """Rows of a failing batch of `count` that fail alone.

    `attempt(rows, limit_s)` runs the function on some rows and gives what went wrong, None where nothing did. A part is
    given its share of the limit, at least an eighth. With `first_only` the search ends with the first row found.
    """
    found = Found()
    rows = list(range(count))
    middle = (count + 1) // 2
    waiting = [part for part in (rows[:middle], rows[middle:]) if part]
    deadline = time.monotonic() + max(SEARCH_TIMES * limit_s, 5.0)
    while waiting:
        part = waiting.pop(0)
        if time.monotonic() > deadline:
            found.undecided += part
            continue
        share = limit_s * max(len(part) / count, 1 / 8)
        problem = attempt(part, max(share, min(limit_s, SHORTEST_LIMIT_S)))
        if problem is None:
            continue
        if len(part) == 1:
            found.rows[part[0]] = problem
            if first_only:
                break
            continue
        middle = len(part) // 2
        waiting[:0] = [part[:middle], part[middle:]]
    return found
