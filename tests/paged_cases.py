"""Random pages with ragged rows, and attention over them row by row in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.attention.paged import FP8, PAGE, Pages, quantized

# prompt and own tokens: single tokens, exact pages, one past a page, several pages of each
LENGTHS = [(1, 1), (PAGE, PAGE), (PAGE + 1, 3), (3, PAGE + 1), (150, 130), (2 * PAGE, 1)]


def random_case(
    heads: int,
    key_heads: int,
    dim: int,
    dtype: torch.dtype,
    *,
    value_dim: int | None = None,
    fp8: bool = False,
    device: str = "cpu",
) -> tuple[Tensor, Pages]:
    """Queries (B, H, D), and pages of rows of `LENGTHS`; the first two rows share their prompt's page."""
    generator = torch.Generator().manual_seed(0)
    widths = [-(-p // PAGE) + -(-o // PAGE) for p, o in LENGTHS]
    count = 1 + sum(widths)
    order = (1 + torch.randperm(count - 1, generator=generator)).tolist()
    table = torch.zeros(len(LENGTHS), max(widths) + 1, dtype=torch.int32)
    for row, width in enumerate(widths):
        table[row, :width] = torch.tensor([order.pop() for _ in range(width)])
    table[1, 0] = table[0, 0]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    keys, values = random(count, key_heads, PAGE, dim), random(count, key_heads, PAGE, value_dim or dim)
    key_scales = value_scales = None
    if fp8:
        (keys, key_scales), (values, value_scales) = quantized(keys), quantized(values)
    lens = torch.tensor(LENGTHS, dtype=torch.int32)
    pages = Pages(keys, values, key_scales, value_scales, table, lens[:, 0].clone(), lens[:, 1].clone())
    moved: list[Any] = [None if x is None else x.to(device) for x in pages]
    return random(len(LENGTHS), heads, dim).to(device), Pages(*moved)


def exact(q: Tensor, pages: Pages, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """(B, H, Dv) float64: each row's keys listed in order, then one plain softmax."""
    keys, values = pages.keys, pages.values
    if keys.dtype == FP8:
        assert pages.key_scales is not None and pages.value_scales is not None
        keys = keys.float().double() * pages.key_scales[..., None]
        values = values.float().double() * pages.value_scales[..., None]
    keys, values = keys.double(), values.double()
    rows = []
    for row, (prompt, own) in enumerate(
        zip(pages.prompt_lens.tolist(), pages.own_lens.tolist(), strict=True)
    ):
        first_own = -(-prompt // PAGE)
        cells = [(i // PAGE, i % PAGE) for i in range(prompt)]
        cells += [(first_own + i // PAGE, i % PAGE) for i in range(own)]
        if window is not None:
            cells = cells[-window:]
        listed = torch.tensor([(int(pages.table[row, page]), cell) for page, cell in cells], device=q.device)
        k, v = (x[listed[:, 0], :, listed[:, 1]] for x in (keys, values))  # (n, K, D)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("hd,nhd->hn", q[row].double(), k) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        rows.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
    return torch.stack(rows)
