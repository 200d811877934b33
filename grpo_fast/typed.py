"""Types for what torch and `isinstance` leave open: lists out of tensors, containers of anything.

Imports no torch, so that a reward function's process starts without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor, nn


def integers(values: Tensor) -> list[int]:
    """A tensor (N,) of whole numbers as a list; waits for its device."""
    return values.tolist()


def floats(values: Tensor) -> list[float]:
    """A tensor (N,) of floating-point numbers as a list; waits for its device."""
    return values.tolist()


def booleans(values: Tensor) -> list[bool]:
    """A tensor (N,) of truth values as a list; waits for its device."""
    return values.tolist()


def rows(values: Tensor) -> list[list[float]]:
    """A tensor (N, M) of floating-point numbers as a list of its rows; waits for its device."""
    return values.tolist()


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with their dotted names, itself first."""
    return model.named_modules()


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    return isinstance(value, tuple)
