"""A table as every benchmark gives it to its page, its terminal and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns."""

    title: str
    head: Sequence[str]
    """Names of the columns; the first one names the rows."""
    rows: Sequence[Sequence[Any]]
    """As many cells each as `head` has: text as it is, numbers with four digits, None as a dash."""
    note: str = ""
    """A sentence above the table."""


def cell(value: Any) -> str:
    """A table's cell as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"
        return text.rstrip(".").replace("-", "−")
    return f"{value:,}".replace("-", "−") if isinstance(value, int) else str(value)
