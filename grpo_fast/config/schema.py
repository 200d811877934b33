"""The names and types of a command's settings, and the conversion of a value to its field's type.

Files and flags go through the same conversion, so that a mistake reads the same wherever it was made.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grpo_fast.config.rules import FieldError
from grpo_fast.errors import did_you_mean
from grpo_fast.typed import is_dict, is_list

COMMAND_LINE = "command line"
SPECIAL = ("config", "dry_run", "resume", "watch", "print_completion")
"""Flags that are no settings."""


@dataclass(frozen=True)
class Schema:
    """What a configuration class holds."""

    config: type
    elsewhere: dict[str, str]
    """Names other trainers use -> ours, for the hint beside an unknown one."""

    @cached_property
    def kinds(self) -> dict[str, Any]:
        """Dotted field name -> its type, sections excluded."""
        return field_kinds(self.config)

    @cached_property
    def sections(self) -> set[str]:
        """Names of the tables."""
        return {item.name for item in fields(self.config)} - set(self.kinds)

    @cached_property
    def mappings(self) -> set[str]:
        """Fields that hold name = value pairs."""
        return {name for name, kind in self.kinds.items() if get_origin(kind) is dict}

    def hint(self, name: str) -> str:
        """What an unknown name may have meant."""
        usual = self.elsewhere.get(name.rpartition(".")[2])
        return f"; did you mean {usual}?" if usual else did_you_mean(name, [*self.kinds, *SPECIAL])


def field_kinds(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field of a dataclass and of those within it."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        kinds |= field_kinds(kind, f"{prefix}{name}.") if is_dataclass(kind) else {prefix + name: kind}
    return kinds


def field_help(section: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> the docstring under the field, of every field that `field_kinds` has."""
    lines: dict[str, str] = {}
    owners = [owner for owner in reversed(section.__mro__) if "__dataclass_fields__" in vars(owner)]
    for owner in owners:
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        for node, below in pairwise(body.body if isinstance(body, ast.ClassDef) else ()):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                lines[node.target.id] = inspect.cleandoc(str(below.value.value))
    found: dict[str, str] = {}
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            found |= field_help(kind, f"{prefix}{name}.")
        elif name in lines:
            found[prefix + name] = lines[name]
    return found


def convert(value: Any, kind: Any, name: str, source: str) -> Any:
    """`value` as the field's type; raises `FieldError` naming what would be right."""
    converted = _fit(value, kind)
    if converted is _MISFIT:
        got = (
            " ".join(map(str, value)) or "nothing" if source == COMMAND_LINE and value == [] else repr(value)
        )
        raise FieldError(name, f"must be {described(kind)}, got {got}".replace("\n", " "), source)
    return converted


_MISFIT = object()


def _fit(value: Any, kind: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _fit(value, inner[0])
    if origin is Literal:
        return value if isinstance(value, str) and value in inner else _MISFIT
    if origin is tuple:
        exact = inner[-1] is not Ellipsis
        if isinstance(value, str) and not exact:
            value = [value] if value else []  # a list of one needs no brackets
        if value == [""] and not exact:
            value = []  # no text at all
        if not is_list(value) or (exact and len(value) != len(inner)):
            return _MISFIT
        items = tuple(_fit(item, inner[0]) for item in value)
        return _MISFIT if _MISFIT in items else items
    if origin is dict:
        if not is_dict(value) or "" in value:
            return _MISFIT
        pairs = {key: _fit(item, inner[1]) for key, item in value.items()}
        return _MISFIT if _MISFIT in pairs.values() else pairs
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if kind is str and isinstance(value, str):
        try:
            value.encode()  # an undecodable argument could not be written to config.toml
        except UnicodeEncodeError:
            return _MISFIT
    return value if type(value) is kind else _MISFIT


def described(kind: Any) -> str:
    """A field's type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return described(inner[0])
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return "a list of texts" if inner[-1] is Ellipsis else f"{len(inner)} numbers"
    if origin is dict:
        what = {float: "number", str: "text"}.get(inner[1]) or " or ".join(get_args(inner[1]))
        return f"name = {what} pairs"
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
