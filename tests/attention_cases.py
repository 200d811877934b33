"""Packed attention from its definition: a masked softmax over the whole row in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.attention.plan import PackedPlan


def seen(plan: PackedPlan, window: int | None) -> Tensor:
    """(L, L) bool on the CPU: which key each query looks at."""
    allowed = torch.zeros(plan.length, plan.length, dtype=torch.bool)
    parts = zip(plan.q_starts, plan.q_lens, plan.prefix_starts, plan.prefix_lens, strict=False)
    for start, size, first, shared in parts:
        keys = torch.tensor([*range(first, first + shared), *range(start, start + size)])
        behind = shared + torch.arange(size)[:, None] - torch.arange(len(keys))
        allowed[start : start + size, keys] = (behind >= 0) & (behind < (window or plan.length + 1))
    return allowed


def truth(
    inputs: list[Tensor],  # q (L, H, D), k (L, K, D), v (L, K, D), and (H,) sinks where there are some
    grad: Tensor,  # (L, H, D)
    plan: PackedPlan,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    scale: float = 0.4,
) -> list[Tensor]:
    """Output and the gradient of every input, float64."""
    values = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = (x.transpose(0, 1) for x in values[:3])
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen(plan, window).to(q.device), float("-inf"))
    if sinks:
        scores = torch.cat([scores, values[3].view(-1, 1, 1).expand(-1, plan.length, 1)], -1)
    out = (scores.softmax(-1)[..., : plan.length] @ v).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, values, grad.double())]
