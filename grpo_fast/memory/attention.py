"""The packed attention as it allocates on the CPU or on a GPU, for models on the meta device.

Registered beside the real one: the fused kernels choose their way by the device of the tensors, and on the meta device
they would take the one that stores every score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from grpo_fast.attention import paths
from grpo_fast.attention.backends import TABLE
from grpo_fast.attention.fused import gathered_keys
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.memory.live import META

COUNTED = "grpo_fast_counted"


@dataclass(frozen=True)
class CountedPlan:
    """What a packed row's attention allocates on a device of kind `device`."""

    packed: PackedPlan
    """Its segments, on the CPU"""
    device: str
    kept: list[Tensor] | None = None
    """Where a prefill keeps its keys and values"""

    @cached_property
    def on_meta(self) -> PackedPlan:
        return self.packed.to(META)

    def with_chunks(self, heads: int, key_heads: int, window: int | None) -> PackedPlan:
        """`on_meta` with its padded rectangles: which entries are padding can only be told on a real device."""
        known = self.on_meta._chunks
        if (heads, key_heads, window) not in known:
            known[heads, key_heads, window] = [
                replace(chunk, **{n: x.to(META) for n, x in vars(chunk).items() if isinstance(x, Tensor)})
                for chunk in self.packed.chunks(heads, key_heads, window)
            ]
        return self.on_meta


def counted_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, L, D)
    key: Tensor,  # (1, K, L, D)
    value: Tensor,  # (1, K, L, Dv)
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: CountedPlan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # (1, L, H, Dv)
    """The way `attention` would go on that device, with the same tensors kept."""
    assert plan is not None and attention_mask is None
    if plan.kept is not None:
        plan.kept.extend((key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, D)
    longest = max(plan.packed.k_lens)
    window = None if sliding_window is not None and sliding_window >= longest else sliding_window
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if plan.device == "cuda" and q.dtype != torch.float32:
        # Every fused kernel: prefixes gathered, then inputs, output and a number a row are kept.
        return _Flash.apply(q, *gathered_keys(k, v, plan.on_meta), 0)[None], None  # type: ignore[index]
    if softcap is None and plan.packed.keys_per_query >= _LEAST_KEYS[plan.device]:
        if plan.device == "cpu":
            return _Flash.apply(q, k, v, max(plan.packed.q_lens))[None], None  # type: ignore[index]
        return paths.by_segment(q, k, v, plan.on_meta, scale=scale, window=window)[None], None
    padded = plan.with_chunks(q.shape[1], k.shape[1], window)
    return paths.padded(q, k, v, padded, scale=scale, window=window, softcap=softcap)[None], None


_LEAST_KEYS = {
    device: min(b.least_keys for b in TABLE if b.choice == "sdpa" and device in b.devices)
    for device in ("cpu", "cuda")
}
"""Keys a query from which SDPA takes over from padded rectangles."""


class _Flash(torch.autograd.Function):
    """What a fused kernel keeps: its inputs and output, and a number a row.

    `tile`: queries of the largest rectangle where gradients of several are added up in float32 (the CPU's), else 0.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tile: int) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        sums = q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.tile = tile
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:3]
        if not ctx.tile:
            return (*(torch.empty_like(x) for x in inputs), None)
        totals = [torch.empty_like(x, dtype=torch.float32) for x in inputs]
        parts = [x.new_empty(min(ctx.tile, len(x)), *x.shape[1:]) for x in inputs]
        del parts
        return (*(total.to(x.dtype) for total, x in zip(totals, inputs, strict=True)), None)


def row_plan(tokens: int, prompt: int, new: int, group: int) -> PackedPlan:
    """A packed row of about `tokens` positions: prompts of `prompt`, each with up to `group` completions of `new`."""
    q_lens: list[int] = []
    starts: list[int] = []
    shared: list[int] = []
    left = max(tokens, prompt + 1)

    def add(length: int, start: int, prefix: int) -> None:
        q_lens.append(length)
        starts.append(start)
        shared.append(prefix)

    while left > prompt:
        first = sum(q_lens)
        add(prompt, 0, 0)
        left -= prompt
        for _ in range(group):
            if left <= 0:
                break
            add(min(new, left), first, prompt)
            left -= min(new, left)
    return PackedPlan(tuple(q_lens), tuple(starts), tuple(shared))


AttentionInterface.register(COUNTED, counted_attention)
