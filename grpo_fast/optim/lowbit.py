"""AdamW whose two running averages take a byte each, through `torchao`.

Block-wise 8-bit states are from Dettmers et al., arXiv 2110.02861; every block of 256 has a float32 scale.
Parameters of fewer than 4096 numbers, or whose number is no multiple of the block of 256, keep float32 averages.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PARTS = ("codes", "scale", "qmap")


def adamw8bit(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """The optimizer over parameter groups that carry their own `weight_decay`; the update itself is in float32."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # its own kernels for other purposes are not needed
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(groups, lr=lr, betas=betas, eps=eps)


@contextmanager
def stepping(parameter: Tensor) -> Iterator[None]:
    """Around a step: torchao compiles it for each shape of parameter, which the CPU does without."""
    with torch.compiler.set_stance("default" if parameter.is_cuda else "force_eager"):
        yield


def parts(state: Tensor) -> list[Tensor]:
    """The plain tensors a state is made of."""
    if is_traceable_wrapper_subclass(state):
        return [getattr(state, name) for name in state.__tensor_flatten__()[0]]
    return [state]


def plain_states(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's `state_dict()` with each 8-bit state as three plain tensors, `exp_avg:codes` and so on."""
    plain: dict[Any, dict[str, Any]] = {}
    for index, values in state_dict["state"].items():
        plain[index] = {}
        for name, value in values.items():
            if is_traceable_wrapper_subclass(value):
                plain[index] |= {f"{name}:{part}": getattr(value, part) for part in _PARTS}
            else:
                plain[index][name] = value
    return {**state_dict, "state": plain}


def quantised_states(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `plain_states`; learning rates become the tensors that torchao's step needs."""
    from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

    whole: dict[Any, dict[str, Any]] = {}
    for index, values in state_dict["state"].items():
        names = dict.fromkeys(name.partition(":")[0] for name in values)
        whole[index] = {
            name: values[name]
            if name in values
            else OptimState8bit(
                *(values[f"{name}:{part}"] for part in _PARTS),
                signed=name == "exp_avg",
                dtype=torch.float32,
            )
            for name in names
        }
    groups = [
        {**group, "lr": torch.as_tensor(group["lr"], dtype=torch.float32)}
        for group in state_dict["param_groups"]
    ]
    return {"state": whole, "param_groups": groups}
