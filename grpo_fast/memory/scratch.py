"""Bytes of what works beside a model: the loss head, the key-value cache, sampling.

B rows decoding, P prompts of a prefill, V vocabulary, H hidden size, N completion tokens of a micro-batch.
"""

from __future__ import annotations

import math

import torch
from grpo_kernels._torch_head import BLOCK_BYTES, MOST_ROWS, SCRATCH_BYTES
from transformers import PreTrainedConfig

from grpo_fast.attention.group_cache import BLOCK
from grpo_fast.attention.paged import PAGE
from grpo_fast.attention.paged_cache import pages_of
from grpo_fast.engines.local import PROMPT_STEP

# Of the CUDA backend of the head, whose module needs triton: E′ of a chunk, logits of a part, tokens of a chunk.
STORED_BYTES, LOGITS_BYTES, CHUNK_ROWS = 1280 << 20, 224 << 20, 4096


def head_scratch(
    tokens: int,  # N
    vocabulary: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    device: str,
    trained: bool,
    entropy: bool = False,
) -> int:
    """What the loss head holds beside its results: kept exponentials, logits, and a trained head's float32 dW."""
    if device == "cuda":
        rows = max(1, min(tokens, CHUNK_ROWS, STORED_BYTES // (dtype.itemsize * vocabulary)))
        part = max(1, min(rows, LOGITS_BYTES // (4 * vocabulary)))
        scratch = rows * vocabulary * dtype.itemsize + part * vocabulary * 4 + 2 * rows * hidden * 4
        summed = trained and dtype != torch.float32 and tokens > rows
        return scratch + (4 * vocabulary * hidden if summed else 0)
    matrices = 2 if entropy else 1
    keeps = trained or entropy
    most = max(1, SCRATCH_BYTES // (4 * matrices * vocabulary)) if keeps else MOST_ROWS
    rows = min(MOST_ROWS, math.ceil(tokens / max(1, math.ceil(tokens / most))))
    block = min(vocabulary, max(256, BLOCK_BYTES // (4 * rows)))
    columns = matrices * vocabulary if keeps else block
    narrow = dtype != torch.float32
    weights = 4 * block * hidden if narrow else 0
    summed = 4 * vocabulary * hidden if trained and narrow else 0
    return 4 * rows * (columns + block) + weights + 4 * 3 * rows * hidden + summed


def cache_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    device: str,
    rows: int,  # B
    each: int,
    waiting: bool,
    prompt: int,
    new: int,
    fp8: bool = False,
) -> tuple[int, int]:
    """Bytes of the built-in engine's cache when the first rows enter, and at its largest.

    `each` completions of a prompt share its keys and values; `waiting`: others take the places of those that end. On a
    GPU pages for everything are there from the start. On the CPU the rows' own slots grow with a clock that goes on
    while rows wait; when it does, one layer's own slots exist twice.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    paged = device == "cuda" or fp8
    vector = width + 4 if fp8 else width * dtype.itemsize
    token = 2 * text.num_hidden_layers * heads * vector
    if paged:
        prompts = min(rows, 2 * -(-rows // each) + 1)
        steps = -(-prompt // PROMPT_STEP) * PROMPT_STEP
        pages = 1 + rows * pages_of(new) + prompts * pages_of(steps)
        return pages * PAGE * token, pages * PAGE * token
    stored = (-(-rows // each) + waiting) * prompt * token
    slots, needed = 0, (2 if waiting else 1) * max(0, new - 1)
    while slots < needed:
        slots = max(slots + BLOCK, slots * 3 // 2)
    own = rows * slots * token
    return stored, stored + own + own // text.num_hidden_layers // 2


def sampling_bytes(rows: int, vocabulary: int, dtype: torch.dtype, *, softcap: bool, truncates: bool) -> int:
    """Logits of `rows` and what drawing from them takes: sorted copies where top-p or the like cuts the tail."""
    logits = 4 + (dtype.itemsize if dtype != torch.float32 else 0)
    drawing = (8 if softcap else 0) + (29 if truncates else 0)
    return rows * vocabulary * (logits + drawing)


def decode_bytes(config: PreTrainedConfig, dtype: torch.dtype, *, rows: int, span: int) -> int:
    """The largest layer's work on one token a row: scores and their softmax, or the gated MLP."""
    text = config.get_text_config(decoder=True)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    scores = rows * span * (2 * 4 * text.num_attention_heads + 4)
    return max(scores, 4 * rows * inner * dtype.itemsize) + 4 * rows * text.hidden_size * 4
