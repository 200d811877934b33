"""One reward function of the user's: finding it, giving it what it takes, reading what it returns.

Worker processes import this file, so it needs nothing that is slow to import.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from grpo_fast.data.records import one_line
from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.typed import is_dict, is_list, is_tuple

FLOAT32_MAX = 3.4e38


class FunctionError(Exception):
    """What a function did wrong in a call, as a line's end after its name; with other rows it may go better."""

    def __init__(self, problem: str, *, row: bool = False, printed: str = "") -> None:
        super().__init__(problem)
        self.printed = printed
        """The last it printed before, as the end of a message"""
        self.names_row = row
        """Whether the problem says already which completion it is about, or is about no single one."""


def load_function(spec: str) -> Callable[..., Any]:
    """The callable that `module:function` names, the working directory being importable.

    Raises `UserError` when the module cannot be imported or has no such callable.
    """
    module_name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"reward function {spec}: no module {missing}, neither in {os.getcwd()} nor installed"
            ) from None
        what = f"importing {module_name} failed: {described(error)}"
        raise UserError(one_line(f"reward function {spec}: {what}")) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            callables = [name for name in dir(found) if callable(getattr(found, name, None))]
            hint = did_you_mean(part, callables)
            raise UserError(f"reward function {spec}: {module_name} has no {attribute}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(
            f"reward function {spec}: {attribute} must be a function, it is of type {type(found).__name__}"
        )
    return found


def described(error: BaseException) -> str:
    """Type, message, and where the innermost frame stands: a traceback in one line."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {error}{place}"


@dataclass(frozen=True)
class Keywords:
    """What a function can be called with."""

    every: bool
    """It takes any keyword"""
    taken: Sequence[str]
    needed: Sequence[str]

    @classmethod
    def of(cls, spec: str, function: Callable[..., Any]) -> Keywords:
        """Those of a function; UserError where it cannot be called by name or does not take completions."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
            every = any(item.kind is item.VAR_KEYWORD for item in parameters)
        except ValueError:  # built-in functions without a signature
            parameters, every = [], True
        named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
        taken = [item.name for item in named]
        if any(item.kind is item.POSITIONAL_ONLY and item.default is item.empty for item in parameters):
            raise UserError(f"reward function {spec}: its arguments must be accepted by name")
        if not every and "completions" not in taken:
            takes = ", ".join(taken) or "nothing"
            raise UserError(
                f"reward function {spec}: must take completions (and may take prompts and the data's other "
                f"columns), it takes {takes}{did_you_mean('completions', taken)}"
            )
        return cls(every, taken, [item.name for item in named if item.default is item.empty])

    def chosen(self, spec: str, arguments: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Those of the arguments the function takes, in lists of their own; UserError where a needed one lacks."""
        for name in self.needed:
            if name not in arguments:
                there = ", ".join(arguments)
                hint = did_you_mean(name, arguments)
                raise UserError(one_line(f"reward function {spec} needs {name!r}, there are {there}{hint}"))
        return {key: list(value) for key, value in arguments.items() if self.every or key in self.taken}


class RewardFunction:
    """One function, called, and the reading of what it returns."""

    def __init__(self, spec: str) -> None:
        """Raises `UserError` where there is no such function or it cannot be called."""
        self._function = load_function(spec)
        self.keywords = Keywords.of(spec, self._function)
        self._name = spec.rpartition(":")[2]
        self._known: Sequence[str] | None = None

    def __call__(
        self, given: dict[str, list[Any]], count: int, known: Sequence[str] | None
    ) -> dict[str, list[float]]:
        """Objective name -> `count` numbers, NaN for a missing one; `known` are the names of earlier calls.

        Raises `FunctionError` for anything else than that, and what the function raises.
        """
        self._known = known
        torch = sys.modules.get("torch")
        if torch is None:
            return self._scores(self._returned(given), count)
        with torch.no_grad():
            return self._scores(self._returned(given), count)

    def _returned(self, given: dict[str, list[Any]]) -> Any:
        value = self._function(**given)
        if not inspect.isawaitable(value):
            return value
        import asyncio  # slower to import than all the rest

        return asyncio.run(_finish(value))

    def _scores(self, value: Any, count: int) -> dict[str, list[float]]:
        if is_dict(value):
            if not value:
                self._refuse("returned a dict without names")
            scores = {
                self._checked_name(name): self._numbers(item, count, name) for name, item in value.items()
            }
        else:
            items = self._list(value, count, "")
            if items and all(isinstance(item, dict) for item in items):
                names = dict.fromkeys(self._checked_name(name) for item in items for name in item)
                if not names and not self._known:
                    self._refuse("returned dicts without names")
                names = dict.fromkeys([*(self._known or ()), *names])
                scores = {
                    name: self._numbers([item.get(name) for item in items], count, name) for name in names
                }
            else:
                scores = {self._name: self._numbers(items, count, "")}
        if self._known is not None and scores.keys() != set(self._known):
            self._refuse(
                f"returned {', '.join(sorted(scores))}, but {', '.join(sorted(self._known))} before", row=True
            )
        return scores

    def _checked_name(self, name: Any) -> str:
        if not isinstance(name, str) or not name:
            self._refuse(f"returned a dict with the name {name!r}, which must be a text")
        return name

    def _list(self, value: Any, count: int, of: str) -> list[Any]:
        if hasattr(value, "tolist"):  # tensors, arrays, series
            value = value.tolist()
        if not (is_list(value) or is_tuple(value)):
            self._refuse(f"returned {_shown(value)}{of}, must be {count} numbers, one a completion")
        if len(value) != count:
            self._refuse(f"returned {len(value)} values{of} for {count} completions")
        return list(value)

    def _numbers(self, value: Any, count: int, name: str) -> list[float]:
        of = f" of {name!r}" if name else ""
        numbers: list[float] = []
        for index, item in enumerate(self._list(value, count, of)):
            number = _number(item)
            if number is None:
                self._refuse(
                    f"returned {_shown(item)}{of} for completion {index}, must be a finite number, or None "
                    "for a missing score",
                    row=True,
                )
            numbers.append(number)
        return numbers

    def _refuse(self, problem: str, *, row: bool = False) -> NoReturn:
        raise FunctionError(problem, row=row)


async def _finish(value: Any) -> Any:
    return await value


def _number(item: Any) -> float | None:
    """`item` as a float, NaN for a missing one; None when it is no finite float32."""
    if item is None:
        return math.nan
    if isinstance(item, str | bytes | list | tuple | dict):
        return None
    try:
        number = float(item)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= FLOAT32_MAX else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
