"""Triton kernels of paged attention: split keys, then the parts merged.

A program takes one row, one key head with all its query heads, and one share of the row's pages; the table's entries
lead to whole pages, so every load is contiguous. With few rows the pages are split over several programs, so that the
GPU is full, and a second kernel merges the parts by their running maxima. The number of parts does not depend on the
lengths, which only the device knows: a launch can be captured in a CUDA graph.

Written in the subset that the interpreter runs. Sums are float32, offsets of pages 64-bit. Launch settings are
reasoned from the compiled kernels (a page of 64 keys of 128 16-bit values is 16 KiB); not measured.

Letters as in `paged.py`; S parts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_fast.attention.paged import PAGE, Pages

jit: Any = triton.jit  # the checker cannot follow what it makes of a function
MOST_PARTS = 16
WARPS = 4
STAGED_BYTES = 160_000
"""Pages of keys and values in flight may take this much shared memory; the smallest GPU meant has 166,912 bytes."""


@jit
def attend_pages(
    q,  # (B, K·G, D)
    keys,  # (C, K, PAGE, D)
    values,  # (C, K, PAGE, Dv)
    key_scales,  # (C, K, PAGE) float32; unused without HAS_SCALES
    value_scales,
    table,  # (B, W) int32
    prompt_lens,  # (B,) int32
    own_lens,  # (B,) int32
    out,  # (B, K·G, Dv); written when there is one part
    mixed,  # (B, K, S, G, Dv) float32: values weighted by exp(score - peak)
    peaks,  # (B, K, S, G) float32
    sums,  # (B, K, S, G) float32: of those weights
    width,  # W
    scale,
    softcap,
    window,  # keys in sight, the query's own included; unused without HAS_WINDOW
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    prompt = tl.load(prompt_lens + row)
    total = prompt + tl.load(own_lens + row)
    own_slot = (prompt + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE  # where own tokens begin
    hole = own_slot - prompt
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(total - window, 0)
    first_slot = tl.where(first < prompt, first, first + hole)
    first_tile = first_slot // PAGE_SIZE
    end_tile = (total + hole + PAGE_SIZE - 1) // PAGE_SIZE
    share = (end_tile - first_tile + PARTS - 1) // PARTS
    start = first_tile + part * share
    stop = tl.minimum(start + share, end_tile)

    group, cells = tl.arange(0, BLOCK_GROUP), tl.arange(0, PAGE_SIZE)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    heads = row.to(tl.int64) * KEY_HEADS * GROUP + head * GROUP + group  # rows of q and out
    real = group < GROUP
    query = tl.load(
        q + heads[:, None] * DIM + dims[None, :], mask=real[:, None] & (dims < DIM)[None, :], other=0.0
    )
    peak = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_GROUP,), tl.float32)
    mix = tl.zeros((BLOCK_GROUP, BLOCK_VALUE), tl.float32)
    for tile in range(start, stop):
        page = tl.load(table + row.to(tl.int64) * width + tile).to(tl.int64)
        lines = (page * KEY_HEADS + head) * PAGE_SIZE + cells
        slot = tile * PAGE_SIZE + cells
        position = tl.where(slot < own_slot, slot, slot - hole)
        seen = ((slot < prompt) | (slot >= own_slot)) & (position < total) & (position >= first)
        key = tl.load(keys + lines[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
        if HAS_SCALES:
            scores *= tl.load(key_scales + lines)[None, :]
        scores *= scale
        if HAS_SOFTCAP:
            decay = tl.exp(-2.0 * tl.abs(scores / softcap))
            bent = (1.0 - decay) / (1.0 + decay)
            scores = tl.where(scores < 0.0, -bent, bent) * softcap
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp(-inf - 0) is 0
        fade = tl.exp(peak - shift)
        p = tl.exp(scores - shift[:, None])
        weight = weight * fade + tl.sum(p, 1)
        if HAS_SCALES:
            p *= tl.load(value_scales + lines)[None, :]
        value = tl.load(
            values + lines[:, None] * VALUE_DIM + value_dims[None, :],
            mask=(value_dims < VALUE_DIM)[None, :],
            other=0.0,
        ).to(query.dtype)
        mix = mix * fade[:, None] + tl.dot(p.to(query.dtype), value, input_precision=PRECISION)
        peak = higher

    stored = real[:, None] & (value_dims < VALUE_DIM)[None, :]
    if PARTS == 1:
        mix /= weight[:, None]
        tl.store(out + heads[:, None] * VALUE_DIM + value_dims[None, :], mix.to(query.dtype), mask=stored)
    else:
        parts = ((row.to(tl.int64) * KEY_HEADS + head) * PARTS + part) * GROUP + group
        tl.store(mixed + parts[:, None] * VALUE_DIM + value_dims[None, :], mix, mask=stored)
        tl.store(peaks + parts, peak, mask=real)
        tl.store(sums + parts, weight, mask=real)


@jit
def merge_parts(
    mixed,  # (B, K, S, G, Dv) float32, as attend_pages left them
    peaks,  # (B, K, S, G) float32
    sums,  # (B, K, S, G) float32
    out,  # (B, K·G, Dv)
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)  # b·K + k
    member = tl.program_id(1)
    dims = tl.arange(0, BLOCK_VALUE)
    first = line * PARTS * GROUP + member
    highest = tl.max(tl.load(peaks + first + tl.arange(0, PARTS) * GROUP), 0)  # finite: the query sees itself
    weight = highest * 0.0
    mix = tl.zeros((BLOCK_VALUE,), tl.float32)
    for part in range(PARTS):
        at = first + part * GROUP
        share = tl.exp(tl.load(peaks + at) - highest)
        weight += share * tl.load(sums + at)
        mix += share * tl.load(mixed + at * VALUE_DIM + dims, mask=dims < VALUE_DIM, other=0.0)
    place = (line * GROUP + member) * VALUE_DIM + dims
    tl.store(out + place, (mix / weight).to(out.dtype.element_ty), mask=dims < VALUE_DIM)


def constants(
    heads: int,
    key_heads: int,
    dim: int,
    value_dim: int,
    *,
    parts: int,
    window: bool,
    softcap: bool,
    scales: bool,
    exact: bool,
) -> dict[str, Any]:
    """The compile-time arguments of `attend_pages`; `exact`: float32 operands, no shorter ones on the way."""
    group = heads // key_heads
    return {
        "KEY_HEADS": key_heads,
        "GROUP": group,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "PARTS": parts,
        "HAS_WINDOW": window,
        "HAS_SOFTCAP": softcap,
        "HAS_SCALES": scales,
        "PRECISION": "ieee" if exact else "tf32",
        "PAGE_SIZE": PAGE,
        "BLOCK_GROUP": max(16, triton.next_power_of_2(group)),  # a tensor core's least
        "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
        "BLOCK_VALUE": max(16, triton.next_power_of_2(value_dim)),
    }


def parts_for(programs: int, processors: int, width: int) -> int:
    """Parts of a row's pages, a power of two: enough programs for two an SM, no more parts than pages."""
    parts = 1
    while parts < MOST_PARTS and parts * programs < 2 * processors and 2 * parts <= width:
        parts *= 2
    return parts


def stages_for(dim: int, value_dim: int, itemsize: int) -> int:
    """Pages loaded ahead of the one worked on, and that one."""
    return 2 if 2 * PAGE * (dim + value_dim) * itemsize <= STAGED_BYTES else 1


def paged_attention_triton(
    q: Tensor,  # (B, H, D)
    pages: Pages,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    parts: int | None = None,
) -> Tensor:  # (B, H, Dv)
    """`paged.paged_attention` by kernels; `parts` overrides the choice by the device."""
    rows, heads, dim = q.shape
    key_heads, value_dim, width = pages.keys.shape[1], pages.values.shape[3], pages.table.shape[1]
    fixed = (*pages[:4], pages.prompt_lens, pages.own_lens)
    assert all(x.is_contiguous() for x in fixed if x is not None)
    table = pages.table if pages.table.stride(1) == 1 else pages.table.contiguous()
    if parts is None:
        properties = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
        processors = properties.multi_processor_count if properties is not None else 8
        parts = parts_for(rows * key_heads, processors, width)
    group = heads // key_heads
    out = q.new_empty(rows, heads, value_dim)
    split = (rows, key_heads, parts, group) if parts > 1 else (1, 1, 1, 1)
    mixed = q.new_empty(*split, value_dim, dtype=torch.float32)
    peaks, sums = (q.new_empty(split, dtype=torch.float32) for _ in range(2))
    scaled = pages.key_scales is not None and pages.value_scales is not None
    compiled = constants(
        heads,
        key_heads,
        dim,
        value_dim,
        parts=parts,
        window=window is not None,
        softcap=softcap is not None,
        scales=scaled,
        exact=q.dtype == torch.float32,
    )
    attend_pages[(rows, key_heads, parts)](
        q.contiguous(),
        pages.keys,
        pages.values,
        pages.key_scales if scaled else sums,
        pages.value_scales if scaled else sums,
        table,
        pages.prompt_lens,
        pages.own_lens,
        out,
        mixed,
        peaks,
        sums,
        table.stride(0),
        scale,
        softcap or 0.0,
        window or 0,
        **compiled,
        num_warps=WARPS,
        num_stages=stages_for(dim, value_dim, q.element_size()),
    )
    if parts > 1:
        merge_parts[(rows * key_heads, group)](
            mixed,
            peaks,
            sums,
            out,
            GROUP=group,
            VALUE_DIM=value_dim,
            PARTS=parts,
            BLOCK_VALUE=compiled["BLOCK_VALUE"],
            num_warps=1,
        )
    return out
