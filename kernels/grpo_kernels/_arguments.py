"""Checks that the operations share. Each message begins with the argument's name."""

import difflib
import numbers
import os
from collections.abc import Iterable

import torch
from torch import Tensor


def check_name(argument: str, value: object, known: Iterable[str]) -> None:
    """ValueError for a value that is none of the known names; says the nearest."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        hint = did_you_mean(value, known)
        raise ValueError(f"{argument} must be one of {', '.join(known)}; got {value!r}{hint}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing where no known name is near."""
    match = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.55)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_number(argument: str, value: object) -> None:
    """TypeError for anything but a real number: truth values, and tensors, whose gradient would be lost."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{argument} must be a number, got {found}")


def check_tensors(
    owner: str, device: torch.device, *, or_cpu: bool = False, **tensors: Tensor | None
) -> None:
    """TypeError for what is no tensor, ValueError for one that is not on the owner's device.

    With ``or_cpu`` it may be on the CPU, too. None passes.
    """
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.device != device and not (or_cpu and value.device.type == "cpu"):
            places = f"{device}" + (", or on the CPU" if or_cpu and device.type != "cpu" else "")
            raise ValueError(f"{name} must be on the device of {owner}, {places}, got {value.device}")


def check_real(argument: str, values: Tensor, *, integers: bool = False) -> None:
    """TypeError for complex numbers and truth values, and for integers where they are not expected."""
    kind = values.dtype
    if not (kind.is_floating_point or (integers and kind != torch.bool and not kind.is_complex)):
        raise TypeError(f"{argument} must be floating point{' or integer' if integers else ''}, got {kind}")


def may_read(values: Tensor) -> bool:
    """Whether to look at values: on the CPU, where it waits for nothing; with GRPO_KERNELS_DEBUG=1 everywhere."""
    return values.device.type == "cpu" or os.environ.get("GRPO_KERNELS_DEBUG") == "1"
