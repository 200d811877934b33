"""Attention over ragged segments in plain PyTorch: ways to compute the same numbers.

`padded` works anywhere and knows softcap, windows and sinks; `by_segment` calls SDPA once a segment. `backends.py`
chooses.

Letters: L packed positions, H query heads, K key heads, G = H / K, D head width.
"""

from __future__ import annotations

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
    sinks: Tensor | None,  # (K·rows, G·q_max, 1) float32
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Softmax over visible keys (K·rows, G·q_max, k_max), tanh(score / softcap) where there is one, and what the
    sinks took (K·rows, G·q_max, 1) where there are any.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    squashed = None
    if softcap is None:
        scores.mul_(scale)
    else:
        squashed = scores.mul_(scale / softcap).tanh_()
        scores = squashed * softcap
    scores.view(key_heads, chunk.rows, -1, chunk.q_max, chunk.k_max).add_(chunk.mask)
    if sinks is None:
        return scores.softmax(-1), squashed, None
    p = torch.cat([scores, sinks], -1).softmax(-1)
    return p[..., :-1], squashed, p[..., -1:]


def _sink_rows(
    sinks: Tensor | None,  # (H,)
    chunk: Chunk,
    key_heads: int,
) -> Tensor | None:
    """Each query's sink, in the layout of the scores: (K·rows, G·q_max, 1) float32."""
    if sinks is None:
        return None
    rows = sinks.float().view(key_heads, 1, -1, 1).expand(-1, chunk.rows, -1, chunk.q_max)
    return rows.reshape(key_heads * chunk.rows, -1, 1)


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
        sinks: Tensor | None,  # (H,)
        chunks: list[Chunk],
        key_heads: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:  # (L·H, D)
        out = q.new_empty(q.shape[0], v.shape[1])
        size = 4 * sum(len(c.q_index) * c.k_max for c in chunks)
        plain = softcap is None and sinks is None
        save = plain and size <= SAVED_BYTES and any(ctx.needs_input_grad)
        saved = []
        for c in chunks:
            batch = key_heads * c.rows
            qc, kc = _take(q, c.q_index, batch, -1), _take(k, c.k_index, batch, -1)
            p, _, _ = _probabilities(qc, kc, c, key_heads, scale, softcap, _sink_rows(sinks, c, key_heads))
            mixed = torch.bmm(p, _take(v, c.k_index, batch, -1)).view(len(c.q_index), -1)
            out.index_copy_(0, c.q_index[c.kept], mixed.index_select(0, c.kept).to(out.dtype))
            if save:
                saved.append(p)
        ctx.save_for_backward(q, k, v, sinks, out, *saved)
        ctx.settings = chunks, key_heads, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, *saved = ctx.saved_tensors
        chunks, key_heads, scale, softcap = ctx.settings
        grad = grad_outputs[0]
        along = (grad.float() * out.float()).sum(-1, keepdim=True)  # (L·H, 1)
        dq = torch.zeros_like(q, dtype=torch.float32)
        dk = torch.zeros_like(k, dtype=torch.float32)
        dv = torch.zeros_like(v, dtype=torch.float32)
        of_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        for i, c in enumerate(chunks):
            batch = key_heads * c.rows
            qc, kc = _take(q, c.q_index, batch, -1), _take(k, c.k_index, batch, -1)
            squashed = taken = None
            if saved:
                p = saved[i]
            else:
                rows = _sink_rows(sinks, c, key_heads)
                p, squashed, taken = _probabilities(qc, kc, c, key_heads, scale, softcap, rows)
            padded = (key_heads, c.rows, -1, c.q_max)
            dout = _take(grad, c.q_index, *padded).mul_(c.valid).view(batch, -1, v.shape[1])
            inner = _take(along, c.q_index, *padded).mul_(c.valid).view(batch, -1, 1)
            dv.index_add_(0, c.k_index, torch.bmm(p.transpose(1, 2), dout).view(len(c.k_index), -1))
            if of_sinks is not None and taken is not None:
                of_sinks -= (taken * inner).view(key_heads, c.rows, -1, c.q_max).sum((1, 3)).flatten()
            ds = torch.bmm(dout, _take(v, c.k_index, batch, -1).transpose(1, 2))
            ds.sub_(inner).mul_(p).mul_(scale)
            if squashed is not None:
                ds.mul_(1 - squashed * squashed)
            dq.index_add_(0, c.q_index, torch.bmm(ds, kc).view(len(c.q_index), -1))
            dk.index_add_(0, c.k_index, torch.bmm(ds.transpose(1, 2), qc).view(len(c.k_index), -1))
        if of_sinks is not None and sinks is not None:
            of_sinks = of_sinks.to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), of_sinks, None, None, None, None


def padded(
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
    """Every segment as a row of a padded rectangle; any device and dtype, computed in float32.

    `sinks`: a logit of each head that takes part in its softmax and has no value.
    """
    heads, key_heads = q.shape[1], k.shape[1]
    chunks = plan.chunks(heads, key_heads, window)
    flat = (x.reshape(-1, x.shape[-1]) for x in (q, k, v))
    return _Padded.apply(*flat, sinks, chunks, key_heads, scale, softcap).view(len(q), heads, -1)  # type: ignore[union-attr]


def by_segment(
    q: Tensor,  # (L, H, D)
    k: Tensor,  # (L, K, D)
    v: Tensor,  # (L, K, Dv)
    plan: PackedPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
        outs.append(
            causal(q[:, :, own], keys, values, scale=scale, window=window, softcap=softcap, sinks=sinks)
        )
    return torch.cat(outs, 2)[0].transpose(0, 1)


def causal(
    q: Tensor,  # (B, H, Tq, D)
    k: Tensor,  # (B, K, Tk, D)
    v: Tensor,  # (B, K, Tk, Dv)
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (B, H, Tq, Dv)
    """Ordinary causal attention of the last Tq of Tk positions."""
    q_len, k_len = q.shape[2], k.shape[2]
    windowed = window is not None and window < k_len
    grouped = q.shape[1] != k.shape[1]
    fused = softcap is None and sinks is None
    if fused and not windowed and (q_len == k_len or q_len == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q_len > 1, scale=scale, enable_gqa=grouped)
    distance = torch.arange(k_len - q_len, k_len, device=q.device)[:, None] - torch.arange(
        k_len, device=q.device
    )
    visible = distance >= 0
    if windowed:
        visible &= distance < (window or k_len)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        return scores.softmax(-1).to(q.dtype) @ v
    column = sinks.float().view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(q.dtype) @ v
