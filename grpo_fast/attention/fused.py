"""Fused CUDA kernels for ragged segments: torch's varlen_attn and the three generations of flash-attn.

Each is given the segments' boundaries among queries and among gathered keys; where a completion shares its prompt the
two differ, and the kernel must align the causal mask at the bottom right. Whether a release does is not taken on
trust: `backends.py` holds each against the reference once. Their arguments changed from release to release, so what a
function accepts is read from its signature.

Letters: L packed positions, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grpo_fast.attention.plan import PackedPlan


class _GatherKeys(torch.autograd.Function):
    """`source[index]` whose gradient is summed in float32: G completions add up on one prompt's keys."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(source)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0]
        total = grad.new_zeros(ctx.rows, *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, ctx.saved_tensors[0], grad.float()).to(grad.dtype), None


def gathered_keys(k: Tensor, v: Tensor, plan: PackedPlan) -> tuple[Tensor, Tensor]:
    """Keys and values (L, K, D) in the order of `plan.cu_k`: every segment's prefix, then itself."""
    if not plan.shares_prefix:
        return k, v
    return _GatherKeys.apply(k, plan.key_index), _GatherKeys.apply(v, plan.key_index)  # type: ignore[return-value]


def flash4(
    q: Tensor,  # (L, H, D) bf16 or fp16
    k: Tensor,  # (L, K, D)
    v: Tensor,  # (L, K, Dv)
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # (L, H, Dv)
    """flash-attn 4 (`flash_attn.cute`), for Hopper and Blackwell."""
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    limits = (None, None) if window is None else (window - 1, 0)
    return _flash(flash_attn_varlen_func, q, k, v, plan, scale, limits, softcap)


def flash3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """flash-attn 3 (`flash_attn_interface`), for Hopper; shapes as `flash4`."""
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash(flash_attn_varlen_func, q, k, v, plan, scale, _behind(window), softcap)


def flash2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """flash-attn 2; shapes as `flash4`."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash(flash_attn_varlen_func, q, k, v, plan, scale, _behind(window), softcap)


def _behind(window: int | None) -> tuple[int, int]:
    """Positions visible behind and ahead of a query; -1: all of them (flash-attn 2 and 3, torch)."""
    return (-1 if window is None else window - 1, 0)


def _flash(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackedPlan,
    scale: float,
    window_size: tuple[int | None, int | None],
    softcap: float | None,
) -> Tensor:
    k, v = gathered_keys(k, v, plan)
    known = _parameters(function)
    longest = {"max_seqlen_q": max(plan.q_lens), "max_seqlen_k": max(plan.k_lens)}
    options: dict[str, Any] = {name: value for name, value in longest.items() if name in known}
    if softcap is not None:
        options["softcap"] = softcap
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=plan.cu_q,
        cu_seqlens_k=plan.cu_k,
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
        **options,
    )
    return out[0] if isinstance(out, tuple) else out


def torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """PyTorch's own (`torch.nn.attention.varlen`); shapes as `flash4`."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = gathered_keys(k, v, plan)
    options: dict[str, Any] = {}
    known = _parameters(varlen_attn)
    if "window_size" in known:
        options["window_size"] = _behind(window)
    elif window is None:
        options["is_causal"] = True
    else:
        raise NotImplementedError("varlen_attn of this torch has no window_size")
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * math.sqrt(q.shape[-1]))
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    limits = (plan.cu_q, plan.cu_k, max(plan.q_lens), max(plan.k_lens))
    return varlen_attn(q, k, v, *limits, **options)  # pyright: ignore[reportReturnType]


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
