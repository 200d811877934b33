"""Tensors as lists, with the types that torch leaves open."""

from torch import Tensor


def integers(values: Tensor) -> list[int]:
    """A tensor (N,) of whole numbers as a list; waits for its device."""
    return values.tolist()


def floats(values: Tensor) -> list[float]:
    """A tensor (N,) of floating-point numbers as a list; waits for its device."""
    return values.tolist()
