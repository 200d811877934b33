"""One reward function of the user's: finding it, giving it what it takes, reading what it returns."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from grpo_fast.data.records import one_line
from grpo_fast.errors import UserError, did_you_mean

_FLOAT32_MAX = 3.4e38


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


class RewardFunction:
    """One function: the keywords it takes, and the reading of what it returns."""

    def __init__(self, spec: str, function: Callable[..., Any]) -> None:
        self.spec, self._function = spec, function
        self._name = spec.rpartition(":")[2]
        self._known: set[str] | None = None
        try:
            parameters = list(inspect.signature(function).parameters.values())
            self._takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters)
        except ValueError:  # built-in functions without a signature
            parameters, self._takes_all = [], True
        named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
        self._takes = {item.name for item in named}
        self._needs = [item.name for item in named if item.default is item.empty]
        if any(item.kind is item.POSITIONAL_ONLY and item.default is item.empty for item in parameters):
            raise UserError(f"reward function {spec}: its arguments must be accepted by name")
        if not self._takes_all and "completions" not in self._takes:
            takes = ", ".join(self._takes) or "nothing"
            raise UserError(
                f"reward function {spec}: must take completions (and may take prompts and the data's other "
                f"columns), it takes {takes}{did_you_mean('completions', self._takes)}"
            )

    def bind(self, arguments: dict[str, list[Any]]) -> Callable[[], Any]:
        """A call with those of the arguments it takes; each call gets lists of its own."""
        for name in self._needs:
            if name not in arguments:
                self._refuse(
                    f"needs {name!r}, there are {', '.join(arguments)}{did_you_mean(name, arguments)}"
                )
        given = {
            key: list(value) for key, value in arguments.items() if self._takes_all or key in self._takes
        }

        def call() -> Any:
            value = self._function(**given)
            return asyncio.run(_finish(value)) if inspect.isawaitable(value) else value

        return call

    def scores(self, value: Any, count: int) -> dict[str, list[float]]:
        """Objective name -> `count` numbers; raises `UserError` for anything that is not that."""
        if isinstance(value, dict):
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
        if self._known is not None and scores.keys() != self._known:
            self._refuse(f"returned {', '.join(sorted(scores))}, but {', '.join(sorted(self._known))} before")
        self._known = set(scores)
        return scores

    def _checked_name(self, name: Any) -> str:
        if not isinstance(name, str) or not name:
            self._refuse(f"returned a dict with the name {name!r}, which must be a text")
        return name

    def _list(self, value: Any, count: int, of: str) -> list[Any]:
        if hasattr(value, "tolist"):  # tensors, arrays, series
            value = value.tolist()
        if not isinstance(value, list | tuple):
            self._refuse(f"returned {_shown(value)}{of}, must be {count} numbers, one a completion")
        if len(value) != count:
            self._refuse(f"returned {len(value)} values{of} for {count} completions")
        return list(value)

    def _numbers(self, value: Any, count: int, name: str) -> list[float]:
        of = f" of {name!r}" if name else ""
        numbers = []
        for index, item in enumerate(self._list(value, count, of)):
            number = _number(item)
            if number is None:
                self._refuse(
                    f"returned {_shown(item)}{of} for completion {index}, must be a finite number, or None "
                    "for a missing score"
                )
            numbers.append(number)
        return numbers

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(one_line(f"reward function {self.spec} {problem}"))


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
    return number if abs(number) <= _FLOAT32_MAX else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
