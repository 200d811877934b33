"""A policy whose weights are shared out over the processes of a run: PyTorch's FSDP2 (`fully_shard`).

Each decoder layer is a unit of its own; embedding, last norm and head are gathered with the policy as a whole. Every
process keeps 1/W of the float32 weights, gradients and optimizer states, gathers a layer in the compute type when it
is needed and sums gradients in float32. W processes, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from grpo_kernels import linear_logprob
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from grpo_fast.errors import UserError
from grpo_fast.parallel.world import World, gather_into


def mesh_of(world: World, device: torch.device) -> DeviceMesh:
    """All processes in one row: each holds one share of everything."""
    return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))


def shard(root: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, *, head_by_vocabulary: bool) -> None:
    """Share out `root`, which contains `model`, in place; trained weights become float32 first.

    `root` must be called as a module, or through one of the methods given to `register_fsdp_forward_method`. With
    `head_by_vocabulary` the head's rows are left out: each process keeps its own and nobody gathers them.
    """
    compute = model.dtype
    precision = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    ignored = set()
    if head_by_vocabulary:
        ignored = set(_share_out_head(model, mesh))
    for layer in decoder_layers(model):
        _widen(layer)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    _widen(root)
    # an unsharded root would stay in memory from the forward to the backward pass; it is the largest unit
    fully_shard(root, mesh=mesh, mp_policy=precision, ignored_params=ignored)
    register_fsdp_forward_method(root, "looked_up")


def refuse_together(given: dict[str, bool]) -> None:
    """UserError for the first setting that is on and has no form for several processes."""
    for name, on in given.items():
        if on:
            raise UserError(f"{name} cannot be had on several processes: leave it off, or use one")


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers; UserError where it has none that can be found."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return list(layers)
    raise UserError(
        f"{type(model).__name__} has no list of decoder layers: it cannot run on several processes"
    )


def full(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole of a tensor that may be shared out, in `dtype`; all processes call it, in the same order."""
    value = value.detach() if dtype is None else value.detach().to(dtype)
    return value.full_tensor() if isinstance(value, DTensor) else value


def _widen(module: nn.Module) -> None:
    """Trained weights in float32: the shards are the optimizer's masters."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


# ---- the head, by rows of the vocabulary ----


def _share_out_head(model: PreTrainedModel, mesh: DeviceMesh) -> list[nn.Parameter]:
    head = cast(Any, model.get_output_embeddings())
    if head.weight is cast(Any, model.get_input_embeddings()).weight:
        raise UserError(
            f"parallel.head = vocabulary: {type(model).__name__} uses one matrix as head and as embedding, which every "
            "process needs whole; leave it at gathered"
        )
    _widen(head)
    found = []
    for name in ("weight", "bias"):
        parameter = getattr(head, name, None)
        if parameter is None:
            continue
        shared = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        own = nn.Parameter(shared, requires_grad=parameter.requires_grad)
        setattr(head, name, own)
        found.append(own)
    return found


class EveryRow(torch.autograd.Function):
    """(n_r, ...) of each process -> (n_0 + n_1 + …, ...) on every one; the gradient of the own rows comes back.

    Only right where the result has the same gradient on every process, as `linear_logprob` with `vocab_group` gives it.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return every_row(own, counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0][ctx.rows], None, None, None


class OwnRows(torch.autograd.Function):
    """The reverse: the own rows of a result that every process has; gradients of all rows reach every process."""

    @staticmethod
    def forward(ctx: Any, everyone: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return everyone[sum(counts[:rank]) : sum(counts[: rank + 1])].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return every_row(gradients[0], ctx.counts, ctx.group), None, None, None


def every_row(own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of all processes, in the order of ranks; `counts` says how many each has."""
    longest = max(counts)
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    gathered = own.new_empty(len(counts) * longest, *own.shape[1:])
    gather_into(gathered, padded, group=group)
    blocks = gathered.view(len(counts), longest, *own.shape[1:])
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


class _Scaled(torch.autograd.Function):
    """The tensor itself; its gradient times `factor`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def logprobs_by_vocabulary(
    hidden: Tensor,  # (n_r, H)
    targets: Tensor,  # (n_r,)
    head: dict[str, Any],
    temperature: float,
    mesh: DeviceMesh,
) -> tuple[Tensor, Tensor]:
    """(n_r,) log-probs and entropy of this process's tokens, with the head's rows where they are; differentiable.

    Every process computes its rows of the vocabulary for everybody's tokens. The losses' sum over processes is what is
    differentiated, where FSDP2 takes their mean: the head's gradient is divided by W here, as FSDP2 divides the others.
    """
    group, rank, size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    weight: Any = head["weight"]
    own, start = _own_rows(weight, size), own_stretch(weight).start
    counts = row_counts(targets, group)
    bias = head["bias"]
    logprobs, entropy = linear_logprob(
        EveryRow.apply(hidden, counts, rank, group),
        own.to(hidden.dtype),
        every_row(targets, counts, group),
        temperature=temperature,
        bias=None if bias is None else _own_rows(bias, size).to(hidden.dtype),
        softcap=head["softcap"],
        logit_scale=head["logit_scale"],
        vocab_group=group,
        vocab_start=start,
    )
    both = OwnRows.apply(torch.stack([logprobs, entropy], 1), counts, rank, group)
    return both[:, 0], both[:, 1]


def _own_rows(shared: DTensor, size: int) -> Tensor:
    return cast(Tensor, _Scaled.apply(shared.to_local(), 1 / size))


def own_stretch(shared: DTensor) -> slice:
    """This process's rows: `Shard(0)` deals them out in stretches of one length, the last ones shorter."""
    count, mesh = shared.shape[0], shared.device_mesh
    length = -(-count // mesh.size())
    first = min(length * mesh.get_local_rank(), count)
    return slice(first, min(first + length, count))


def row_counts(own: Tensor, group: dist.ProcessGroup) -> list[int]:
    """How many rows each process has."""
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=own.device)
    gather_into(counts, torch.tensor([len(own)], device=own.device), group=group)
    return counts.tolist()
