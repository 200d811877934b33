"""Naming the nearest known name, for messages about one that is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, by the whole or by the part after the last dot; None: none is."""

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        tail = SequenceMatcher(None, name.lower().rpartition(".")[2], candidate.lower().rpartition(".")[2])
        return max(whole, 0.99 * tail.ratio()) + 1e-3 * whole

    best = max(sorted(set(known)), key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean X?` or nothing, to be put at the end of a message."""
    best = nearest(name, known)
    return f"; did you mean {prefix}{best}?" if best else ""
