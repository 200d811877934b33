"""Reward matrix -> group-relative advantages, for one reward or several.

S sequences in P groups of at most G, R reward heads.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._arguments import check_name, check_real
from ._head import ELEMENTWISE_BACKENDS, check_backend, choose_backend, on_device
from ._listed import floats, integers
from ._operators import shapes_of

Mode = Literal["scalarized", "per_head", "gdpo", "dvao", "leave_one_out"]
Scale = Literal["group", "batch", "none"]
MODES = ("scalarized", "per_head", "gdpo", "dvao", "leave_one_out")
SCALES = ("group", "batch", "none")

# Rewards come from float32 arithmetic: a spread below this share of their magnitude is rounding, not signal.
_ROUNDING = 1e-7


def group_advantages(
    rewards: Tensor,  # (S, R) or (S,)
    *,
    group_size: int = 8,
    group_sizes: Tensor | Sequence[int] | None = None,
    weights: Tensor | Sequence[float] | None = None,  # (R,)
    mode: Mode = "gdpo",
    scale: Scale | None = None,
    std_floor: float = 0.0,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Advantage of each sequence over the others of its group.

    With μ_k and σ_k the mean and standard deviation (ddof 1) of head k in the group, over what is observed:

    - scalarized: ``(Σ w_k r_k - mean) / (std + eps)`` of the weighted sum (arXiv 2503.21819)
    - per_head: ``Σ w_k (r_k - μ_k) / (σ_k + eps)``
    - gdpo: per_head, then divided by its standard deviation over the batch (arXiv 2601.05242)
    - dvao: ``Σ w_k (r_k - μ_k) / (Σ |w_k| σ_k + eps)``
    - leave_one_out: weighted sum minus the mean of the others' (RLOO, arXiv 2402.14740)

    A missing reward (NaN) adds nothing: it counts as its group's mean. A head (a sum, for scalarized and
    leave_one_out) whose σ in the group is at most std_floor, or mere rounding, gives exactly 0 there; so
    does a group of one.

    Args:
        rewards: (S, R) or (S,), groups contiguous; NaN where a head gave no value.
        group_size: sequences per group where group_sizes is None; must divide S.
        group_sizes: sizes of the groups in order, summing to S; a tensor on a GPU is read back to the host.
        weights: (R,), default ones; may be negative.
        mode: one of the above.
        scale: the σ that divides: of the "group", of all raw values in the "batch", or "none" (Dr. GRPO).
            None: the mode's own, "none" for leave_one_out and "group" for the others.
        std_floor: in the unit of the rewards.
        eps: added to each divisor.
        backend: "torch", "triton" (one kernel; three where a spread over the batch is needed), or "auto": triton
            on CUDA where it is installed.

    Returns:
        (S,) float32 on the device of rewards. Computed in float64.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or value, infinite rewards (on a GPU, where looking would
        stop the host, they are not found), dvao with scale="none"; the message names it.
    """
    values = rewards.detach().unsqueeze(1) if rewards.ndim == 1 else rewards.detach()
    if values.ndim != 2:
        raise ValueError(f"rewards must have shape (S, R) or (S,), got {tuple(rewards.shape)}")
    if values.is_complex():
        raise TypeError(f"rewards must be real numbers, got {values.dtype}")
    check_name("mode", mode, MODES)
    if scale is None:
        scale = "none" if mode == "leave_one_out" else "group"
    check_name("scale", scale, SCALES)
    if mode == "dvao" and scale == "none":
        raise ValueError(
            "mode 'dvao' divides by the weighted sum of σ; scale must be 'group' or 'batch', got 'none'"
        )
    if not (0 <= std_floor < math.inf and 0 <= eps < math.inf):
        raise ValueError(f"std_floor and eps must be finite and not negative, got {std_floor} and {eps}")
    check_backend(backend, ELEMENTWISE_BACKENDS)
    heads = values.shape[1]
    w = None if weights is None else torch.as_tensor(weights)
    if w is not None and w.shape != (heads,):
        raise ValueError(f"weights must have shape (R,) = ({heads},), got {tuple(w.shape)}")
    if w is not None:
        check_real("weights", w, integers=True)
    sizes = None if group_sizes is None else torch.as_tensor(group_sizes)
    if sizes is not None and (sizes.ndim != 1 or sizes.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"group_sizes must be integers of shape (P,), got {sizes.dtype} {tuple(sizes.shape)}"
        )
    return _advantages(values, group_size, sizes, w, mode, scale, float(std_floor), float(eps), backend)


@torch.library.custom_op("grpo_kernels::group_advantages", mutates_args=())
def _advantages(
    values: Tensor,  # (S, R)
    group_size: int,
    group_sizes: Tensor | None,
    weights: Tensor | None,
    mode: str,
    scale: str,
    std_floor: float,
    eps: float,
    backend: str,
) -> Tensor:
    count, heads = values.shape
    if weights is not None and weights.device.type == "cpu" and not bool(weights.isfinite().all()):
        raise ValueError(f"weights must be finite, got {floats(weights)}")
    w = None if weights is None else weights.to(values.device, torch.float64, non_blocking=True)
    if values.device.type == "cpu" and bool(values.isinf().any()):
        row = int(values.isinf().any(1).nonzero()[0])
        raise ValueError(f"rewards must be finite or NaN, got {floats(values[row])} in row {row}")
    sizes = _sizes(count, group_size, group_sizes)
    if count == 0:
        return torch.empty(0, device=values.device)  # float32, as below
    if choose_backend(backend, values.device, torch.float32) == "triton":
        from ._advantage_kernels import advantages_of_groups  # imports triton, which only this backend needs

        with on_device(values.device):
            return advantages_of_groups(
                values, sizes, w, mode=mode, scale=scale, std_floor=std_floor, eps=eps
            )

    values = values.double()
    w = values.new_ones(heads) if w is None else w
    place = _places(sizes).to(values.device)
    # Groups side by side, padded with NaN: missing and absent are the same thing from here on.
    grouped = values.new_full((len(sizes) * max(sizes), heads), torch.nan)
    grouped[place] = values
    grouped = grouped.view(len(sizes), max(sizes), heads)  # (P, G, R)
    centred = _centre(grouped)
    if mode in ("scalarized", "leave_one_out"):
        magnitude = (grouped.nan_to_num().abs() * w.abs()).sum(2, keepdim=True)
        present = _present(grouped).any(2, keepdim=True)
        total = (centred.nan_to_num() * w).sum(2, keepdim=True)
        centred = torch.where(present, total, torch.nan)
        raw = torch.where(present, (_filled(grouped) * w).sum(2, keepdim=True), torch.nan)
        advantages = _scaled(centred, raw, magnitude, scale, std_floor, eps)
        if mode == "leave_one_out":
            others = _present(centred).sum(1, keepdim=True)
            advantages = advantages * others / (others - 1).clamp(min=1)
        result = advantages.nan_to_num().sum(2)
    elif mode == "dvao":
        sigma = _std(centred, 1) if scale == "group" else _std(grouped, (0, 1))
        divisor = (sigma * w.abs()).sum(2, keepdim=True) + eps
        flat = _flat(centred, grouped.abs(), std_floor)
        result = (torch.where(flat, 0.0, centred.nan_to_num()) * w / divisor).nan_to_num().sum(2)
    else:
        result = (_scaled(centred, grouped, grouped.abs(), scale, std_floor, eps).nan_to_num() * w).sum(2)
        if mode == "gdpo":
            # each group sums to zero, so the batch mean is zero already; 0/0 where eps is 0 and all are flat
            result = (result / (result.flatten()[place].std() + eps)).nan_to_num() if count > 1 else result
    return result.flatten()[place].float()


@shapes_of(_advantages)
def _(
    values: Tensor,
    group_size: int,
    group_sizes: Tensor | None,
    weights: Tensor | None,
    mode: str,
    scale: str,
    std_floor: float,
    eps: float,
    backend: str,
) -> Tensor:
    return values.new_empty(values.shape[0], dtype=torch.float32)


def _sizes(count: int, group_size: int, group_sizes: Tensor | None) -> list[int]:
    """Sizes of the groups, checked."""
    if group_sizes is None:
        if group_size < 1 or count % group_size:
            raise ValueError(f"group_size must divide S = {count}, got {group_size}")
        return [group_size] * (count // group_size)
    sizes = integers(group_sizes)
    if sum(sizes) != count or any(size < 1 for size in sizes):
        raise ValueError(f"group_sizes must be positive and sum to S = {count}, got a sum of {sum(sizes)}")
    return sizes


def _places(sizes: list[int]) -> Tensor:
    """Where each sequence lies among the groups padded to the widest: (S,)."""
    lengths = torch.tensor(sizes, dtype=torch.int64)
    first = torch.arange(len(sizes)) * max(sizes) - (lengths.cumsum(0) - lengths)
    return torch.arange(sum(sizes)) + first.repeat_interleave(lengths)


def _present(values: Tensor) -> Tensor:
    return ~values.isnan()


def _centre(values: Tensor) -> Tensor:
    """Minus the mean of what is observed in the group; NaN stays NaN."""
    return values - values.nanmean(1, keepdim=True)


def _filled(values: Tensor) -> Tensor:
    """Missing values replaced by their group's mean, or 0 where the group has none."""
    return torch.where(_present(values), values, values.nanmean(1, keepdim=True)).nan_to_num()


def _std(values: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Standard deviation, ddof 1, of what is observed; 0 for fewer than two values. Keeps the dimensions."""
    count = _present(values).sum(dims, keepdim=True)
    off = (values - values.nanmean(dims, keepdim=True)).nan_to_num()
    return ((off * off).sum(dims, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _flat(centred: Tensor, magnitude: Tensor, std_floor: float) -> Tensor:
    """Where a group's spread carries no signal, (P, 1, heads)."""
    rounding = magnitude.nan_to_num().amax(1, keepdim=True) * _ROUNDING
    return _std(centred, 1) <= rounding.clamp(min=std_floor)


def _scaled(
    centred: Tensor, raw: Tensor, magnitude: Tensor, scale: str, std_floor: float, eps: float
) -> Tensor:
    flat = _flat(centred, magnitude, std_floor)
    if scale == "group":
        centred = centred / (_std(centred, 1) + eps)
    elif scale == "batch":
        centred = centred / (_std(raw, (0, 1)) + eps)
    return torch.where(flat & _present(centred), 0.0, centred)
