"""Attention of one query a row over keys and values in pages: the operation, its plain twin, and who computes it.

A row's table names the pages of its prompt, which the rows of a group share, and then its own. The prompt's last page
may be part empty: own tokens always begin on a page of their own, so nothing is ever copied or written twice.

Letters: B rows, H query heads, K key heads, G = H / K, D and Dv head widths, C pages, W pages of a row.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 64
"""Tokens of a page; also the keys that the kernel takes at once."""
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0

log = logging.getLogger(__name__)


class Pages(NamedTuple):
    """One layer's keys and values, and where each row finds its own."""

    keys: Tensor  # (C, K, PAGE, D) float32, 16-bit or float8_e4m3fn
    values: Tensor  # (C, K, PAGE, Dv)
    key_scales: Tensor | None  # (C, K, PAGE) float32: keys are stored divided by it; None: as they are
    value_scales: Tensor | None
    table: Tensor  # (B, W) int32
    prompt_lens: Tensor  # (B,) int32 tokens of the shared prompt
    own_lens: Tensor  # (B,) int32 own tokens, the query's own included: the query stands at the last of them


def paged_attention(
    q: Tensor,  # (B, H, D)
    pages: Pages,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (B, H, Dv)
    """Softmax attention to a row's prompt and own tokens, in the dtype of `q`; sums are float32."""
    if q.is_cuda and _kernel_works(
        q.device,
        q.dtype,
        pages.keys.dtype,
        (q.shape[1], pages.keys.shape[1], q.shape[2], pages.values.shape[3]),
        window is not None,
        softcap,
    ):
        from grpo_fast.attention.paged_kernel import paged_attention_triton

        return paged_attention_triton(q, pages, scale=scale, window=window, softcap=softcap)
    return reference(q, pages, scale=scale, window=window, softcap=softcap)


def reference(
    q: Tensor,  # (B, H, D)
    pages: Pages,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (B, H, Dv)
    """The same in plain PyTorch: every row's pages gathered, arithmetic in float32 (float64 where `q` is)."""
    rows, heads, dim = q.shape
    key_heads, high = pages.keys.shape[1], torch.promote_types(q.dtype, torch.float32)
    prompt, own = (lens.long()[:, None] for lens in (pages.prompt_lens, pages.own_lens))
    hole = -prompt % PAGE
    table = pages.table
    if not q.is_cuda:  # looking would wait for a GPU
        table = table[:, : -(-int((prompt + hole + own).max()) // PAGE)]
    slot = torch.arange(table.shape[1] * PAGE, device=q.device)
    position = slot - (slot >= prompt + hole) * hole  # (B, slots)
    hidden = (position >= prompt + own) | ((slot >= prompt) & (slot < prompt + hole))
    if window is not None:
        hidden |= position < prompt + own - window

    def gathered(cache: Tensor, scales: Tensor | None) -> Tensor:
        taken = _rows_of(cache, table).to(high)  # (B, W, K, PAGE, D)
        if scales is not None:
            taken = taken * _rows_of(scales, table)[..., None]
        return taken.transpose(1, 2).flatten(2, 3)

    keys, values = gathered(pages.keys, pages.key_scales), gathered(pages.values, pages.value_scales)
    grouped = q.view(rows, key_heads, heads // key_heads, dim).to(high)
    scores = torch.matmul(grouped, keys.mT) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    p = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return torch.matmul(p, values).view(rows, heads, -1).to(q.dtype)


def _rows_of(cache: Tensor, table: Tensor) -> Tensor:
    """cache[table], also for types of one byte, which have no gather of their own."""
    if cache.element_size() > 1:
        return cache[table.long()]
    return cache.view(torch.uint8)[table.long()].view(cache.dtype)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) as float8_e4m3fn and the float32 scale (...) of each vector, its largest value / 448."""
    scales = x.float().abs().amax(-1).div_(FP8_LARGEST).clamp_(min=1e-12)
    return (x.float() / scales[..., None]).to(FP8), scales


@cache
def _kernel_works(
    device: torch.device,
    dtype: torch.dtype,
    stored: torch.dtype,
    shape: tuple[int, int, int, int],
    windowed: bool,
    softcap: float | None,
) -> bool:
    """Try the kernel once on a small case against `reference`: a wrong answer must not be possible."""
    if importlib.util.find_spec("triton") is None:
        log.warning("no triton: decoding gathers every row's pages, which is slow")
        return False
    from grpo_fast.attention.paged_kernel import paged_attention_triton

    heads, key_heads, dim, value_dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, generator=generator).to(dtype)

    keys, values = random(9, key_heads, PAGE, dim), random(9, key_heads, PAGE, value_dim)
    scales: list[Tensor | None] = [None, None]
    if stored == FP8:
        (keys, scales[0]), (values, scales[1]) = quantized(keys), quantized(values)
    table = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int32, device=device)
    prompt_lens, own_lens = torch.tensor([[70, 3], [90, 1]], dtype=torch.int32, device=device)
    pages = Pages(keys, values, scales[0], scales[1], table, prompt_lens, own_lens)
    q, options = random(2, heads, dim), {"scale": 0.3, "window": 40 if windowed else None, "softcap": softcap}
    try:
        got = paged_attention_triton(q, pages, **options).float()
        worst = ((got - reference(q, pages, **options).float()).norm() / got.norm()).item()
    except Exception as error:  # whatever a compiler may raise: said, and the plain way taken
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("the paged kernel does not run here, decoding gathers pages, which is slow: %s", reason)
        return False
    if not worst < 0.02:
        log.warning("the paged kernel differs from the reference by %.3g on %s; not used", worst, device)
        return False
    return True
