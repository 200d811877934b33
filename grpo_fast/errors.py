"""The one exception that means: the user can mend this. And the nearest known name, for its message."""

from collections.abc import Iterable
from difflib import SequenceMatcher

from grpo_fast.shown import error_line

LONGEST_NAME = 200
"""Characters of a name that may have been meant for another."""


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, where, and what would be right.

    The commands print it without a traceback and exit with code 2. Whatever it quotes, it is fit to be printed.
    """

    agreed = False
    """Whether every process of the run raises the same now, so that they may still do something together"""

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        super().__init__(error_line(message))
        self.agreed = agreed


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived; the step that was running has been finished."""


class HalfUpdated(UserError):
    """The same in the middle of a step whose weights have moved already: they must not be saved as a step's end."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, by the whole or by the part after the last dot; None: none is."""
    if len(name) > LONGEST_NAME:  # comparing takes the product of the lengths
        return None

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        tail = SequenceMatcher(None, name.lower().rpartition(".")[2], candidate.lower().rpartition(".")[2])
        if tail.ratio() < 0.5:  # the same section alone is no likeness
            return 0.0
        return max(whole, 0.99 * tail.ratio()) + 1e-3 * whole

    best = max(sorted(set(known)), key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean X?` or nothing, to be put at the end of a message."""
    best = nearest(name, known)
    return f"; did you mean {prefix}{best}?" if best else ""
