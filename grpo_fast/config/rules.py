"""What the checks of every command's settings are made of: rules, their sentences, and what all commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from grpo_fast.errors import UserError
from grpo_fast.typed import is_dict, is_tuple


class FieldError(UserError):
    """A setting that cannot be used: `field` is its dotted name, `problem` the rest of the sentence."""

    def __init__(self, field: str, problem: str, source: str = "") -> None:
        super().__init__(f"{field} {problem}" + (f" ({source})" if source else ""))
        self.field, self.problem = field, problem


Rule = tuple[str, Callable[[Any], bool]]


def above(bound: float) -> Rule:
    return f"> {bound}", lambda value: value > bound


def at_least(bound: float) -> Rule:
    return f">= {bound}", lambda value: value >= bound


def between(low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> Rule:
    def holds(value: float) -> bool:
        return (low < value if low_open else low <= value) and (value < high if high_open else value <= high)

    return f"in {'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}", holds


def pair(rule: Rule) -> Rule:
    return f"two numbers {rule[0]}", lambda pair: all(rule[1](value) for value in pair)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> value, in the order of the file."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            values |= flatten(value, f"{prefix}{item.name}.")
        else:
            values[prefix + item.name] = value
    return values


def check_ranges(config: Any, ranges: Mapping[str, Rule]) -> None:
    """Raises `FieldError` for the first number that is not finite or out of its range; None is not looked at."""
    for name, value in flatten(config).items():
        for number in value if is_tuple(value) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise FieldError(name, f"must be finite, got {number}")
        for key, number in value.items() if is_dict(value) else ():
            if isinstance(number, float) and not math.isfinite(number):
                raise FieldError(f"{name}.{key}", f"must be finite, got {number}")
        if value is not None and name in ranges:
            text, holds = ranges[name]
            if not holds(value):
                raise FieldError(name, f"must be {text}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if is_tuple(value) else str(value)


def check_common(config: Any) -> None:
    """The fields every command has: raises `FieldError` for a name, folder or device that cannot be one."""
    if config.name in (".", "..") or re.search(r"[/\\\x00-\x1f]", config.name):
        raise FieldError("name", f"must be the name of one folder, got {config.name!r}")
    if not config.output_dir:
        raise FieldError("output_dir", "must name a folder, got an empty text")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise FieldError("device", f"must be auto, cpu, cuda or cuda:N, got {config.device!r}")
