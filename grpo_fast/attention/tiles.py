"""Attention of long segments on the CPU: rectangles of queries and keys, merged by their log-sum-exp.

A completion that shares its prompt sees two rectangles: the prompt's keys, all of them visible to every completion of
the group, and itself, causally. The prompt's rectangle is computed once for the whole group on slices of the packed
row, so no key is copied and no mask is built; softmax over both is the two results weighted by exp(log-sum-exp). The
backward pass of each rectangle, given the merged output and the merged log-sum-exp, is its exact share of the gradient.

Letters: L packed positions, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.attention.plan import PackedPlan, Tile

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # (1, H, L, D)
        k: Tensor,  # (1, K, L, D)
        v: Tensor,  # (1, K, L, D)
        sinks: Tensor | None,  # (H,)
        tiles: list[Tile],
        scale: float,
    ) -> Tensor:  # (L, H, D)
        out = q.new_empty(q.shape[2], q.shape[1], q.shape[3])
        lse = torch.full(out.shape[:2], float("-inf"), dtype=torch.float32)  # (L, H)
        for tile in tiles:
            part, sums = _forward(
                *_slices(q, k, v, tile), 0.0, tile.causal, attn_mask=_mask(tile, q), scale=scale
            )
            rows, part, sums = slice(*tile.queries), part[0].transpose(0, 1), sums[0].transpose(0, 1)
            if tile.first:
                out[rows], lse[rows] = part, sums
                continue
            share = torch.sigmoid(sums - lse[rows])[..., None].to(out.dtype)
            out[rows] = torch.lerp(out[rows], part, share)
            lse[rows] = torch.logaddexp(lse[rows], sums)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.float())
            out.mul_((lse - total).exp_()[..., None])
            lse = total
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.settings = tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        tiles, scale = ctx.settings
        grad = grad_outputs[0]
        grads = [torch.zeros(x.transpose(1, 2).shape, dtype=torch.float32).transpose(1, 2) for x in (q, k, v)]
        heads_first = [x.transpose(0, 1)[None] for x in (grad, out, lse)]  # (1, H, L, ...)
        for tile in tiles:
            rows, keys = slice(*tile.queries), slice(*tile.keys)
            g, o, s = (x[:, :, rows] for x in heads_first)
            parts = _backward(
                g, *_slices(q, k, v, tile), o, s, 0.0, tile.causal, attn_mask=_mask(tile, q), scale=scale
            )
            for total, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
                total[:, :, where] += part
        of_sinks = None
        if sinks is not None:
            along = (grad.float() * out.float()).sum(-1)  # (L, H)
            of_sinks = -((sinks.float() - lse).exp_() * along).sum(0).to(sinks.dtype)
        dq, dk, dv = (total.to(q.dtype) for total in grads)
        return dq, dk, dv, of_sinks, None, None


def _slices(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = slice(*tile.queries), slice(*tile.keys)
    return q[:, :, rows], k[:, :, keys], v[:, :, keys]


def _mask(tile: Tile, q: Tensor) -> Tensor | None:
    return None if tile.mask is None else tile.mask.to(q.dtype)


def tiled(
    q: Tensor,  # (L, H, D)
    k: Tensor,  # (L, K, D)
    v: Tensor,  # (L, K, D)
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (L, H, D)
    """Every tile of the plan in PyTorch's flash kernel for the CPU: nothing of size length² is stored, no softcap."""
    assert softcap is None
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _Tiles.apply(*heads_first, sinks, plan.tiles(window), scale)  # type: ignore[return-value]
