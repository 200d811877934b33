"""Drawing tokens: one stream of uniform numbers per completion, inverted through the model's distribution.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from grpo_fast.engines.base import Sampling

BLOCK = 128
"""Tokens summed at once when searching the distribution: two short cumulative sums instead of one over V."""
BELOW_ONE = 1.0 - 2.0**-40
FEW = 256
"""Likeliest tokens looked at before all of them are sorted."""
LOG2_E = 1 / math.log(2)


def uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): the stream of one completion, whoever else is generated beside it."""
    key = np.array([seed % 2**64, (prompt << 32 | sample) % 2**64], dtype=np.uint64)
    return np.minimum(np.random.Generator(np.random.Philox(key=key)).random(count), BELOW_ONE)


def draw(
    logits: Tensor,  # (B, V) float32, overwritten
    uniform: Tensor,  # (B,) float64
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob under the distribution used: (B,) int64 and (B,) float64.

    A row whose logits hold NaN or +inf, or nothing but -inf, gets the log-prob NaN. Nothing synchronises on a GPU, so
    the draw can be captured in a CUDA graph.
    """
    peak = logits.amax(1, keepdim=True)
    if sampling.temperature == 0:
        token = logits.argmax(1, keepdim=True)
        weights = logits.sub_(peak).mul_(LOG2_E).exp2_()
        total = weights.sum(1, dtype=torch.float64)
        return token[:, 0], weights.gather(1, token)[:, 0].double().div_(total).log_()
    # exp2 takes 0.6 of the time of exp on a CPU
    weights = logits.sub_(peak).mul_(LOG2_E / sampling.temperature).exp2_()
    if sampling.truncates:
        _truncate(weights, sampling)
    return _invert(weights, uniform)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative weight passes uniform · total, and the log of its share."""
    vocabulary = weights.shape[1]
    whole = vocabulary // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(2)
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], 1)
    cumulative = sums.cumsum(1, dtype=torch.float64)  # (B, blocks)
    total = cumulative[:, -1:]
    target = uniform[:, None] * total
    block = (cumulative <= target).sum(1, keepdim=True)
    before = cumulative.gather(1, block) - sums.gather(1, block)

    index = block * BLOCK + torch.arange(BLOCK, device=weights.device)  # (B, BLOCK)
    inside = (
        weights.gather(1, index.clamp(max=vocabulary - 1)).double().masked_fill_(index >= vocabulary, 0.0)
    )
    cumulative = inside.cumsum(1)
    # block sums are rounded to float32, so the rest of the target may lie a hair past the block's end
    rest = torch.minimum(target - before, cumulative[:, -1:] * BELOW_ONE)
    pick = (cumulative <= rest).sum(1, keepdim=True).clamp_(max=BLOCK - 1)
    token = (block * BLOCK + pick).clamp_(max=vocabulary - 1)
    return token[:, 0], (inside.gather(1, pick) / total).log_()[:, 0]


def _truncate(weights: Tensor, sampling: Sampling) -> None:
    """Set the weights (largest: 1) of excluded tokens to 0. Tokens tied with the last one kept are kept."""
    least = torch.full_like(weights[:, :1], sampling.min_p)
    top_k = 0 < sampling.top_k < weights.shape[1]
    if top_k:
        likeliest = weights.topk(sampling.top_k, dim=1).values  # in falling order
        least = torch.maximum(least, likeliest[:, -1:])
        if sampling.top_p < 1:
            # tokens tied with the last one belong to the distribution too
            last = likeliest[:, -1:]
            ties = (weights == last).sum(1, keepdim=True) - (likeliest == last).sum(1, keepdim=True)
            total = likeliest.sum(1, keepdim=True, dtype=torch.float64) + ties * last
            least = torch.maximum(least, _nucleus(likeliest, total, sampling.top_p))
    elif sampling.top_p < 1:
        total = weights.sum(1, keepdim=True, dtype=torch.float64)
        # Most of the mass is usually among few tokens; only the CPU may look whether it is without waiting for a GPU.
        few = weights.topk(FEW, dim=1).values if weights.shape[1] > FEW and not weights.is_cuda else None
        if few is None or bool(
            (few.sum(1, keepdim=True, dtype=torch.float64) < sampling.top_p * total).any()
        ):
            few = weights.sort(1, descending=True).values
        least = torch.maximum(least, _nucleus(few, total, sampling.top_p))
    weights.masked_fill_(weights < least, 0.0)


def _nucleus(ordered: Tensor, total: Tensor, top_p: float) -> Tensor:
    """(B, 1) the smallest of the falling weights (B, n) that top_p of `total` (B, 1) needs."""
    cumulative = ordered.cumsum(1, dtype=torch.float64)
    enough = (cumulative - ordered) < top_p * total  # what came before is not enough
    return ordered.masked_fill(~enough, float("inf")).amin(1, keepdim=True)
