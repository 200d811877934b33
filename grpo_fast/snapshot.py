"""Weights and optimizer as they are now, copied to the host for a checkpoint, and put back from one.

On several processes each copies its shards (`DTensor`); a checkpoint of any number of processes is put back on any
other. States are named by their parameter's place in the optimizer, masters by that among the trained ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_shared

from grpo_fast.errors import UserError
from grpo_fast.models.sharded import full, own_stretch
from grpo_fast.optim import lowbit
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.parallel.world import World
from grpo_fast.run import checkpoint
from grpo_fast.run.shards import load_named, save_shards

_MASTER = re.compile(r"\d+")
_STATE = re.compile(r"(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a checkpoint holds, on the host; training may go on meanwhile."""

    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    together: bool
    """Whether all processes write it, each its shards; else the first one writes the whole"""

    def write(self, run_dir: Path, step: int, *, keep: int, world: World) -> None:
        """To `checkpoints/step-<step>`, whole or not at all; UserError on every process where one fails."""
        if self.together:
            named = {name: value for group in self.groups.values() for name, value in group.items()}
            save_shards(run_dir, step, named, self.state, keep=keep, world=world)
            return

        def on_first() -> None:
            checkpoint.save(run_dir, step, self.groups, self.state, keep=keep)

        world.first(on_first, saving=True)


def take(
    model: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    *,
    world: World,
    form: str = "sharded",
    copy: bool = True,
    extra: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Of `model` what is trained (with LoRA the adapter), the optimizer, `extra` tensors, and `state`, plain JSON.

    `form` (of several processes): sharded, or full, gathered one tensor after another by the first process. Without
    `copy` tensors that are on the host already are not copied: then nothing may change until it is written.
    """
    own = optimizer.state_dict()
    moments, plain = checkpoint.flatten_optimizer(own["inner"])
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    groups = {
        "model": trained,
        "optimizer": moments,
        "masters": own["masters"],
        "extra": {f"extra.{name}": value for name, value in (extra or {}).items()},
    }
    together = world.size > 1 and form == "sharded"
    return Snapshot(
        groups={
            group: _on_host(named, world, together=together, copy=copy) for group, named in groups.items()
        },
        state={"optimizer": plain, "skipped_steps": own["skipped_steps"], **state},
        together=together,
    )


@torch.no_grad()
def put_back(
    path: Path, model: nn.Module, optimizer: Optimizer, world: World
) -> tuple[Named, dict[str, Any]]:
    """Load a checkpoint into model and optimizer; returns its `extra` tensors and its state."""
    world.first(lambda: checkpoint.check(path))
    try:
        return _put_back(path, model, optimizer, world)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        # its checksums are right, so this was put together by something else than `take`
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"checkpoint {path} is whole, but not of this model and optimizer ({what})"
        ) from error


def _put_back(
    path: Path, model: nn.Module, optimizer: Optimizer, world: World
) -> tuple[Named, dict[str, Any]]:
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(own.values())
    in_optimizer = optimizer.ordered

    def place(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter = own.get(name)
        if _MASTER.fullmatch(name) and int(name) < len(parameters):
            parameter = parameters[int(name)]
        elif (match := _STATE.fullmatch(name)) and int(match[1]) < len(in_optimizer):
            parameter = in_optimizer[int(match[1])]
        if isinstance(parameter, DTensor) and parameter.shape == size:
            mesh = _host_mesh(parameter.device_mesh)
            return empty_shared(*size, dtype=dtype, device_mesh=mesh, placements=parameter.placements)
        return torch.empty(size, dtype=dtype)

    named, state, aliases = load_named(path, place, world)
    carried = [value for numbers in state["carried"].values() for value in numbers.values()]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in carried):
        raise ValueError("its state carries what is no number")
    if type(state["step"]) is not int or path.name != f"step-{state['step']:06d}":
        raise ValueError(f"its state is that of step {state['step']!r}")
    named |= {alias: named[name] for alias, name in aliases.items()}
    for name, parameter in own.items():
        saved = named.get(name)
        if saved is None or saved.shape != parameter.shape:
            found = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
            raise UserError(
                f"checkpoint {path}: weight {name} {found}, the model has {tuple(parameter.shape)}"
            )
    weights = [named[name] for name in own]
    masters = [named.get(str(i), weight) for i, weight in enumerate(weights)]
    for i, (parameter, kept) in enumerate(zip(parameters, optimizer.masters, strict=True)):
        # a float32 parameter is its own master, whatever it was where the checkpoint was written
        _local(parameter).copy_(_local(masters[i] if kept is parameter else weights[i]))
    moments = {name: value for name, value in named.items() if _STATE.fullmatch(name)}
    if world.size > 1:
        moments = _like_parameters(lowbit.widened(moments), optimizer)
    optimizer.load_state_dict(
        {
            "inner": checkpoint.unflatten_optimizer(moments, state["optimizer"]),
            "masters": {
                str(i): masters[i]
                for i, (parameter, kept) in enumerate(zip(parameters, optimizer.masters, strict=True))
                if kept is not parameter
            },
            "skipped_steps": state["skipped_steps"],
        }
    )
    extra = {name.removeprefix("extra."): value for name, value in named.items() if name.startswith("extra.")}
    return extra, state


Named = dict[str, Tensor]


def _on_host(named: Mapping[str, Tensor], world: World, *, together: bool, copy: bool) -> Named:
    """Copies that training does not change; names of one tensor share one copy."""
    found: Named = {}
    if together:
        return {name: _host_copy(value) for name, value in named.items()}
    if world.size > 1:
        for name, value in named.items():
            whole = full(value)
            if world.is_first:
                found[name] = whole.to("cpu", copy=not isinstance(value, DTensor))
        return found
    unique, aliases = checkpoint.without_aliases(named)
    pinned = [value for value in unique.values() if value.is_cuda]
    for name, value in unique.items():
        if value.is_cuda:
            room = torch.empty_like(value, device="cpu", pin_memory=True)
            found[name] = room.copy_(value, non_blocking=True)
        else:
            found[name] = value.detach().clone() if copy else value
    if pinned:
        torch.cuda.synchronize(pinned[0].device)
    return {name: found[aliases.get(name, name)] for name in named}


def _host_copy(value: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return value.detach().to("cpu", copy=True)
    local = value.to_local().detach().to("cpu", copy=True)
    return lowbit.shared_like(local, value, _host_mesh(value.device_mesh))


def _like_parameters(moments: Named, optimizer: Optimizer) -> Named:
    """States on the parameters' mesh and device; those that came whole are cut to this process's share."""
    found: Named = {}
    ordered = optimizer.ordered
    for name, value in moments.items():
        match = _STATE.fullmatch(name)
        assert match is not None
        parameter = ordered[int(match[1])]
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            found[name] = value
            continue
        local = value.to_local() if isinstance(value, DTensor) else value[own_stretch(parameter)].clone()
        found[name] = lowbit.shared_like(local.to(parameter.device), parameter)
    return found


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


@lru_cache(maxsize=4)
def _host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same processes with their shards on the host."""
    if mesh.device_type == "cpu":
        return mesh
    return init_device_mesh("cpu", (mesh.size(),), mesh_dim_names=("shard",))
