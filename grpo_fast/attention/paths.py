"""Attention over ragged segments: three ways to compute the same numbers.

`padded` works anywhere and knows softcap and windows; `by_segment` calls SDPA once a segment; `varlen` is one
fused CUDA kernel for all segments. `function.py` chooses.

Letters: L packed positions, H query heads, K key heads, G = H / K, D head width.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fast.attention.plan import Chunk, PackedPlan

SAVED_BYTES = 1 << 24
"""Probabilities up to this size are kept from forward to backward; larger ones are computed again."""


def _take(source: Tensor, index: Tensor, *shape: int) -> Tensor:
    """Rows of `source` as float32, in the given shape."""
    return source.index_select(0, index).view(*shape, source.shape[1]).float()


def _probabilities(
    q: Tensor,  # (K·rows, G·q_max, D)
    k: Tensor,  # (K·rows, k_max, D)
    chunk: Chunk,
    key_heads: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax over visible keys (K·rows, G·q_max, k_max), and tanh(score / softcap) where there is one."""
    scores = torch.bmm(q, k.transpose(1, 2))
    squashed = None
    if softcap is None:
        scores.mul_(scale)
    else:
        squashed = scores.mul_(scale / softcap).tanh_()
        scores = squashed * softcap
    scores.view(key_heads, chunk.rows, -1, chunk.q_max, chunk.k_max).add_(chunk.mask)
    return scores.softmax(-1), squashed


class _Padded(torch.autograd.Function):
    """Chunks of similar segments as batched matrix products in float32.

    Written by hand because autograd's version of the gathers costs more than the attention itself at the
    lengths that matter here (tens of tokens).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # (L·H, D)
        k: Tensor,  # (L·K, D)
        v: Tensor,  # (L·K, D)
        chunks: list[Chunk],
        key_heads: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:  # (L·H, D)
        out = q.new_empty(q.shape[0], v.shape[1])
        size = 4 * sum(len(c.q_index) * c.k_max for c in chunks)
        save = softcap is None and size <= SAVED_BYTES and any(ctx.needs_input_grad)
        saved = []
        for c in chunks:
            batch = key_heads * c.rows
            p, _ = _probabilities(
                _take(q, c.q_index, batch, -1), _take(k, c.k_index, batch, -1), c, key_heads, scale, softcap
            )
            mixed = torch.bmm(p, _take(v, c.k_index, batch, -1)).view(len(c.q_index), -1)
            out.index_copy_(0, c.q_index[c.kept], mixed.index_select(0, c.kept).to(out.dtype))
            if save:
                saved.append(p)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.settings = chunks, key_heads, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        chunks, key_heads, scale, softcap = ctx.settings
        grad = grad_outputs[0]
        along = (grad.float() * out.float()).sum(-1, keepdim=True)  # (L·H, 1)
        dq = torch.zeros_like(q, dtype=torch.float32)
        dk = torch.zeros_like(k, dtype=torch.float32)
        dv = torch.zeros_like(v, dtype=torch.float32)
        for i, c in enumerate(chunks):
            batch = key_heads * c.rows
            qc, kc = _take(q, c.q_index, batch, -1), _take(k, c.k_index, batch, -1)
            squashed = None
            if saved:
                p = saved[i]
            else:
                p, squashed = _probabilities(qc, kc, c, key_heads, scale, softcap)
            padded = (key_heads, c.rows, -1, c.q_max)
            dout = _take(grad, c.q_index, *padded).mul_(c.valid).view(batch, -1, v.shape[1])
            inner = _take(along, c.q_index, *padded).mul_(c.valid).view(batch, -1, 1)
            dv.index_add_(0, c.k_index, torch.bmm(p.transpose(1, 2), dout).view(len(c.k_index), -1))
            ds = torch.bmm(dout, _take(v, c.k_index, batch, -1).transpose(1, 2))
            ds.sub_(inner).mul_(p).mul_(scale)
            if squashed is not None:
                ds.mul_(1 - squashed * squashed)
            dq.index_add_(0, c.q_index, torch.bmm(ds, kc).view(len(c.q_index), -1))
            dk.index_add_(0, c.k_index, torch.bmm(ds.transpose(1, 2), qc).view(len(c.k_index), -1))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def padded(
    q: Tensor,  # (L, H, D)
    k: Tensor,  # (L, K, D)
    v: Tensor,  # (L, K, Dv)
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (L, H, Dv)
    """Every segment as a row of a padded rectangle; any device and dtype, computed in float32."""
    heads, key_heads = q.shape[1], k.shape[1]
    chunks = plan.chunks(heads, key_heads, window)
    flat = (x.reshape(-1, x.shape[-1]) for x in (q, k, v))
    return _Padded.apply(*flat, chunks, key_heads, scale, softcap).view(len(q), heads, -1)  # type: ignore[union-attr]


def by_segment(
    q: Tensor,  # (L, H, D)
    k: Tensor,  # (L, K, D)
    v: Tensor,  # (L, K, Dv)
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
) -> Tensor:  # (L, H, Dv)
    """One SDPA call a segment: nothing of size length² is stored, so this is the way for long segments."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, L, D)
    outs = []
    for start, q_len, first, shared in zip(
        plan.q_starts, plan.q_lens, plan.prefix_starts, plan.prefix_lens, strict=False
    ):
        own = slice(start, start + q_len)
        keys, values = k[:, :, own], v[:, :, own]
        if shared:
            prefix = slice(first, first + shared)
            keys = torch.cat([k[:, :, prefix], keys], 2)
            values = torch.cat([v[:, :, prefix], values], 2)
        outs.append(causal(q[:, :, own], keys, values, scale=scale, window=window))
    return torch.cat(outs, 2)[0].transpose(0, 1)


def causal(
    q: Tensor,  # (B, H, Tq, D)
    k: Tensor,  # (B, K, Tk, D)
    v: Tensor,  # (B, K, Tk, Dv)
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:  # (B, H, Tq, Dv)
    """Ordinary causal attention of the last Tq of Tk positions."""
    q_len, k_len = q.shape[2], k.shape[2]
    windowed = window is not None and window < k_len
    grouped = q.shape[1] != k.shape[1]
    if softcap is None and not windowed and (q_len == k_len or q_len == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q_len > 1, scale=scale, enable_gqa=grouped)
    distance = torch.arange(k_len - q_len, k_len, device=q.device)[:, None] - torch.arange(
        k_len, device=q.device
    )
    visible = distance >= 0
    if windowed:
        visible &= distance < (window or k_len)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).to(q.dtype) @ v


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


def varlen(
    q: Tensor,  # (L, H, D) bf16 or fp16 on CUDA
    k: Tensor,  # (L, K, D)
    v: Tensor,  # (L, K, D)
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    package: str,
) -> Tensor:  # (L, H, D)
    """All segments in one kernel of `package` ("torch" or "flash_attn"), causal from the bottom right."""
    k, v = gathered_keys(k, v, plan)
    limits = (plan.cu_q, plan.cu_k, max(plan.q_lens), max(plan.k_lens))
    behind = -1 if window is None else window - 1
    if package == "flash_attn":
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func(
            q,
            k,
            v,
            *limits,
            softmax_scale=scale,
            causal=True,
            window_size=(behind, 0),
            softcap=softcap or 0.0,
        )
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    accepted = _varlen_parameters()
    if "window_size" in accepted:
        options["window_size"] = (behind, 0)
    else:
        options["is_causal"] = True
    if "scale" in accepted:
        options["scale"] = scale
    else:
        q = q * (scale * math.sqrt(q.shape[-1]))
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return varlen_attn(q, k, v, *limits, **options)  # pyright: ignore[reportReturnType]


@cache
def _varlen_parameters() -> frozenset[str]:
    """Argument names of torch's varlen_attn, which changed from release to release; empty without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_packages(*, window: int | None, softcap: float | None) -> list[str]:
    """Packages whose fused kernel offers what this attention needs, best first."""
    packages = []
    accepted = _varlen_parameters()
    if softcap is None and accepted and (window is None or "window_size" in accepted):
        packages.append("torch")
    if importlib.util.find_spec("flash_attn") is not None:
        packages.append("flash_attn")
    return packages
