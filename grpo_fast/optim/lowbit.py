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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SMALLEST, BLOCK = 4096, 256
_PARTS = ("codes", "scale", "qmap")
_AVERAGES = ("exp_avg", "exp_avg_sq")


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
    """The optimizer's `state_dict()` with each 8-bit state as three plain tensors, `exp_avg:codes` and so on.

    A state that is shared out over processes becomes float32 instead: blocks end at a share's end, so another number of
    processes has other blocks. On the same number the same codes come back.
    """
    plain: dict[Any, dict[str, Any]] = {}
    for index, values in state_dict["state"].items():
        plain[index] = {}
        for name, value in values.items():
            if isinstance(value, DTensor):
                plain[index][name] = _widened_share(value)
            elif is_traceable_wrapper_subclass(value):
                plain[index] |= {f"{name}:{part}": getattr(value, part) for part in _PARTS}
            else:
                plain[index][name] = value
    return {**state_dict, "state": plain}


def quantised_states(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `plain_states`; learning rates become the tensors that torchao's step needs."""
    from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

    def quantised(name: str, values: Mapping[str, Any]) -> Any:
        signed = name == "exp_avg"
        if name not in values:
            return OptimState8bit(
                *(values[f"{name}:{part}"] for part in _PARTS), signed=signed, dtype=torch.float32
            )
        value = values[name]
        local = value.to_local() if isinstance(value, DTensor) else value
        if name not in _AVERAGES or local.numel() < SMALLEST or local.numel() % BLOCK:
            return value
        codes = OptimState8bit.zeros(local.shape, signed, BLOCK, local.device, torch.float32).copy_(local)
        return shared_like(codes, value) if isinstance(value, DTensor) else codes

    whole: dict[Any, dict[str, Any]] = {
        index: {
            name: quantised(name, values) for name in dict.fromkeys(name.partition(":")[0] for name in values)
        }
        for index, values in state_dict["state"].items()
    }
    groups = [
        {**group, "lr": torch.as_tensor(group["lr"], dtype=torch.float32)}
        for group in state_dict["param_groups"]
    ]
    return {"state": whole, "param_groups": groups}


def widened(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flat states (`3.exp_avg:codes`, …) with each 8-bit state as one float32 tensor (`3.exp_avg`)."""
    found = {name: value for name, value in moments.items() if ":" not in name}
    coded = dict.fromkeys(name.partition(":")[0] for name in moments if ":" in name)
    for name in coded:
        from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

        parts_of = [moments[f"{name}:{part}"] for part in _PARTS]
        parts_of = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts_of]
        signed = name.endswith(".exp_avg")
        found[name] = OptimState8bit(*parts_of, signed=signed, dtype=torch.float32).dequantize()
    return found


def shared_like(local: Tensor, other: DTensor, mesh: DeviceMesh | None = None) -> DTensor:
    """This process's share of a tensor that is shared out as `other` is, over its processes' devices or `mesh`."""
    return DTensor.from_local(
        local,
        mesh or other.device_mesh,
        other.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )


def _widened_share(value: DTensor) -> Tensor:
    local = value.to_local()
    return shared_like(local.dequantize(), value) if is_traceable_wrapper_subclass(local) else value  # type: ignore[operator]
