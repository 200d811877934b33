"""FlexAttention on packed rows: for what the fused kernels cannot (softcap, attention sinks), on a CUDA device.

The mask is the plan itself: a key is visible to the queries behind it in its own segment, and to the segments whose
prefix it lies in. Which blocks of 128 × 128 hold anything is computed on the host from the segments' boundaries, so no
length × length mask is ever made. Sinks enter through the log-sum-exp, whose gradient FlexAttention knows.

Letters: L packed positions (padded: T), H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from grpo_fast.attention.plan import PackedPlan

BLOCK = 128
RECOMPILE_LIMIT = 256
"""Lengths, windows, dtypes and modes of one process."""


def flex(
    q: Tensor,  # (L, H, D)
    k: Tensor,  # (L, K, D)
    v: Tensor,  # (L, K, Dv)
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (L, H, Dv)
    """Compiled FlexAttention under the plan's block mask; no key is copied."""
    length = bucket(plan.length)
    if (length, window) not in plan.block_masks:
        plan.block_masks[length, window] = block_mask(plan, window, length)
    pad = (0, 0, 0, 0, 0, length - plan.length)
    q, k, v = (F.pad(x, pad).transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, D)
    options: dict[str, Any] = {
        "score_mod": None if softcap is None else _capped(softcap),
        "block_mask": plan.block_masks[length, window],
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    run: Callable[..., Any] = _compiled() if q.is_cuda else flex_attention
    if sinks is None:
        out = run(q, k, v, **options)
    else:
        out, aux = run(q, k, v, return_aux=AuxRequest(lse=True), **options)
        out = out * torch.sigmoid(aux.lse - sinks.float().view(1, -1, 1))[..., None].to(out.dtype)
    return out[0].transpose(0, 1)[: plan.length]  # type: ignore[index]


def bucket(length: int) -> int:
    """The next length that is compiled for: blocks of 128, eight steps to each doubling."""
    step = max(BLOCK, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


@cache
def _compiled() -> Callable[..., Any]:
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(*args: Any, **options: Any) -> Any:
        # past the usual limit of 8 it would go on uncompiled, with all scores in memory
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled(*args, **options)

    return run


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def visibility(plan: PackedPlan, window: int | None, length: int) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod of a plan; the positions past its end see each other only."""
    columns = [
        torch.tensor(values).repeat_interleave(torch.tensor(plan.q_lens))
        for values in (
            range(len(plan.q_lens)),
            plan.prefix_starts,
            [a + b for a, b in zip(plan.prefix_starts, plan.prefix_lens, strict=True)],
            [b - a for a, b in zip(plan.q_starts, plan.prefix_lens, strict=False)],
        )
    ]
    fill = (-1, 0, 0, 0)
    segment, first, end, shift = (
        F.pad(column, (0, length - plan.length), value=value).to(plan.device)
        for column, value in zip(columns, fill, strict=True)
    )

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_prefix = (k >= first[q]) & (k < end[q])
        visible = in_prefix | ((segment[q] == segment[k]) & (k <= q))
        if window is None:
            return visible
        place = torch.where(in_prefix, k - first[q], k + shift[q])  # of the key, in the query's sequence
        return visible & (q + shift[q] - place < window)

    return mask_mod


def block_mask(plan: PackedPlan, window: int | None, length: int) -> BlockMask:
    """The plan's block mask over `length` (a multiple of 128) positions."""
    count = length // BLOCK
    touched = torch.zeros(count, count, dtype=torch.bool)
    whole = torch.zeros_like(touched)
    for first, end in plan.groups:
        shared, prefix = plan.prefix_lens[first], plan.prefix_starts[first]
        rows = plan.q_starts[first], plan.q_starts[end]
        if shared:
            _mark(touched, whole, rows, (prefix, prefix + shared))
        for s in range(first, end):
            own = plan.q_starts[s], plan.q_starts[s + 1]
            _mark(touched, whole, own, own)
    if length > plan.length:
        _mark(touched, whole, (plan.length, length), (plan.length, length))
    order = torch.arange(count)
    touched &= order[:, None] >= order  # keys never lie behind their queries
    whole &= order[:, None] > order
    if window is not None:
        whole.zero_()
    partial = touched & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partial, plan.device),
        *_listed(whole, plan.device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visibility(plan, window, length),
    )


def _mark(touched: Tensor, whole: Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> None:
    """Blocks that the rectangle rows × keys touches, and those that lie inside it."""
    outer = [slice(low // BLOCK, -(-high // BLOCK)) for low, high in (rows, keys)]
    inner = [slice(-(-low // BLOCK), max(-(-low // BLOCK), high // BLOCK)) for low, high in (rows, keys)]
    touched[outer[0], outer[1]] = True
    whole[inner[0], inner[1]] = True


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many key blocks each row of blocks has (1, 1, rows) and which, those first (1, 1, rows, columns)."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return tuple(x.to(torch.int32)[None, None].to(device) for x in (blocks.sum(1), order))  # type: ignore[return-value]
