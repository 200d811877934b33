"""Rated replies as plain data, whatever file they come from, and the checks that all schemas share."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from grpo_fast.data.prompts import Messages
from grpo_fast.data.records import one_line
from grpo_fast.errors import UserError

Kind = Literal["regression", "binary", "ordinal", "pairwise"]
KINDS: tuple[Kind, ...] = ("regression", "binary", "ordinal", "pairwise")

LARGEST = 1e30  # no scale goes so far, but mistakes do, and float32 ends at 3e38
MISSING = {"", "nan", "n/a", "na", "null", "none"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One reply is better than another on one head."""

    head: str
    better: int
    """The place of the better reply in the example's replies."""
    worse: int
    margin: float = 0.0
    """How much better, at least 0, in the data's own unit; 0 where the data does not say."""


@dataclass(frozen=True, kw_only=True)
class RatedExample:
    """A prompt, replies to it, and what is known of them."""

    prompt: str | Messages
    replies: tuple[str, ...]
    labels: tuple[dict[str, float], ...]
    """Each reply's labels by head, in the data's own unit; a missing label is absent."""
    comparisons: tuple[Comparison, ...] = ()
    where: str = ""
    """file:line, for messages."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """One objective as the data rates it."""

    name: str
    kind: Kind
    """regression: any number. binary: 0 or 1 (a share in between where `kinds` asks for it). ordinal: whole
    numbers in order. pairwise: comparisons alone."""
    low: float | None = None
    """The lower end of the scale where the schema or the kind fixes it (HelpSteer2: 0), else None."""
    high: float | None = None
    better: Literal["high", "low"] = "high"
    """Which end is the good one."""


Notes = dict[tuple[str, str], list[str]]
"""What is worth saying but no fault: (noun, rest of the sentence) -> the places where it was met."""


def note(notes: Notes, noun: str, rest: str, where: str) -> None:
    notes.setdefault((noun, rest), []).append(where)


def sentences(notes: Notes) -> list[str]:
    """One line a note: how often, what, and the first place."""
    return [
        f"{counted(len(places), noun)} {rest}, the first at {places[0]}"
        for (noun, rest), places in notes.items()
    ]


def counted(count: int, noun: str) -> str:
    """`1 reply`, `2 replies`, `3 pairs`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


def shown(value: Any) -> str:
    """A value for a message: short, on one line, whatever it is."""
    return one_line(reprlib.repr(value))


def listed(names: Iterable[str]) -> str:
    """Names for a message; one that cannot be printed is escaped."""
    text = ", ".join(name if name and name.isprintable() else repr(name) for name in names)
    return text if len(text) <= 150 else text[:149] + "…"


def quoted(text: str) -> str:
    """A text as one word of a POSIX shell, quoted whether it needs to be or not."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def prompt_key(prompt: str | Messages) -> str:
    """Equal for the same prompt: a plain text and a chat of that one user's message are the same."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return json.dumps([[message["role"], message["content"]] for message in prompt])


# ---- numbers ----


def is_missing(value: Any) -> bool:
    """null, NaN, and the texts that stand for them in tables."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_number(value: Any, *, typed: bool) -> bool:
    """Whether a value is a number; a text of digits is one only where the file has no types (CSV)."""
    if isinstance(value, str):
        return not typed and _parsed(value) is not None
    return isinstance(value, bool | int | float | Decimal)


def number(value: Any, where: str, name: str) -> float | None:
    """The number `value` is, or is written as; None where it is missing; UserError for anything else."""
    if is_missing(value):
        return None
    parsed = _parsed(value)
    if parsed is None:
        raise UserError(f"{where}: {name} must be a number, got {shown(value)}")
    if not abs(parsed) <= LARGEST:
        raise UserError(f"{where}: {name} must be a finite number, got {shown(value)}")
    return parsed


def label(value: Any, spec: HeadSpec, where: str, name: str = "") -> float | None:
    """The label `value` is on the scale of `spec`; None where it is missing. `name`: the place in the row."""
    parsed = number(value, where, name or spec.name)
    if parsed is None:
        return None
    if spec.kind == "binary" and parsed not in (0, 1):
        raise UserError(f"{where}: {name or spec.name} must be true or false, 1 or 0, got {shown(value)}")
    if spec.low is not None and spec.high is not None and not spec.low <= parsed <= spec.high:
        raise UserError(
            f"{where}: {name or spec.name} must be in {spec.low:g} to {spec.high:g}, got {shown(value)}"
        )
    return parsed


def _parsed(value: Any) -> float | None:
    """None for what is no number; an infinite one where it is too large for a float."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("true", "false"):
            return float(text == "true")
        value = text if "_" not in text else None  # Python reads 1_2, which is an id, as twelve
    elif not isinstance(value, bool | int | float | Decimal):
        return None
    try:
        return None if value is None else float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None
