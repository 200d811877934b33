"""Triton kernels over rows of logits: one program a row, whatever the vocabulary.

They move bytes: a read of float32 logits and a write of E′ is all the traffic, so what matters is wide loads
and stores and enough of them in flight. The masks of loads and stores are therefore bounds that are multiples
of 16 (rows are padded to that), never "all columns but the target", which would split every store into single
elements.

Written in the subset that the interpreter runs: no inline assembly, no libdevice, no autotuning. Arithmetic
is float32 whatever is stored. Row offsets are 64-bit: rows times vocabulary passes 2^31.

n rows of a chunk, V vocabulary, P columns of the padded rows, E and E′ as in ``kernels/README.md``.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

jit: Any = triton.jit  # the checker cannot follow what it makes of a function

EXPONENT_LIMIT = tl.constexpr(41.0)  # about log 2^59; an exponential beyond is cut off there
LARGEST_SUM = tl.constexpr(
    5.0e17
)  # below exp(EXPONENT_LIMIT): a row with any such exponential is swept again
LOWEST_BIAS = tl.constexpr(-1e30)  # stands for -inf: its exponential is 0, and 0 · LOWEST_BIAS is no NaN
NO_STORE = tl.constexpr(0)
STORE_EXPONENTIALS = tl.constexpr(1)
STORE_PROBABILITIES = tl.constexpr(2)


class Launch(NamedTuple):
    """Columns a program takes at once, and its warps."""

    block: int
    warps: int


# (compute capability's major number, bytes of a stored element) -> launch. Eight elements a thread are one or
# two 16-byte accesses and keep a program at 40 registers a thread, 64 with every option on: 1024 threads fit
# an SM, and every row of a part (384 of Qwen2.5) is resident at once on 132 SMs. Reasoned from the compiled kernels and
# the bytes in flight; not measured.
_LAUNCHES = {
    (8, 2): Launch(1024, 4),  # A100 and older consumer cards: less bandwidth to fill, fewer threads an SM
    (8, 4): Launch(1024, 4),
    (9, 2): Launch(2048, 8),
    (9, 4): Launch(2048, 8),
    (10, 2): Launch(2048, 8),
    (10, 4): Launch(2048, 8),
}


def launch_for(major: int, stored: torch.dtype, vocabulary: int) -> Launch:
    """The launch of every row kernel, for a compute capability and the dtype of E′."""
    newest = max(key[0] for key in _LAUNCHES)
    block, warps = _LAUNCHES[(min(max(major, 8), newest), 2 if stored.itemsize == 2 else 4)]
    while block >= 2 * vocabulary and block > 32:
        block, warps = block // 2, max(1, warps // 2)
    return Launch(block, warps)


@jit
def _exponent(raw, bias, columns, inside, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """scale · cap(raw + bias), and the derivative of the cap there."""
    slope = raw * 0.0 + 1.0
    if HAS_BIAS:
        raw += tl.maximum(tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32), LOWEST_BIAS)
    if HAS_SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(raw / softcap))
        bent = (1.0 - decay) / (1.0 + decay)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        raw = tl.where(raw < 0.0, -bent, bent) * softcap
    return raw * scale, slope


@jit
def _log1p(x):
    """log(1 + x) for x >= 0, to full relative precision however small x is."""
    ratio = x / (2.0 + x)
    square = ratio * ratio  # at most 1/25 where the series is used
    series = 1.0 + square * (1.0 / 3 + square * (0.2 + square * (1.0 / 7 + square * (1.0 / 9 + square / 11))))
    return tl.where(x < 0.5, 2.0 * ratio * series, tl.log(1.0 + x))


@jit
def _largest(
    line,
    bias,
    vocabulary,
    padded,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest exponent of a row."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        raw = tl.load(line + columns, mask=columns < padded, other=0.0)
        logit, _ = _exponent(raw, bias, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        best = tl.maximum(best, tl.where(inside, logit, float("-inf")))
    return tl.max(best, 0)


@jit
def _sweep(
    line,
    out,
    bias,
    target,
    reference,
    factor,
    vocabulary,
    padded,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    SLOPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Over all columns but the target: sum of exponentials, sum of exponential times exponent.

    Stores exponential · factor (times the cap's slope where SLOPED), 0 at the target and in the padding.
    """
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        raw = tl.load(line + columns, mask=columns < padded, other=0.0)
        logit, slope = _exponent(raw, bias, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        others = inside & (columns != target)
        # The padding may hold anything: out of range before it is multiplied with a zero.
        exponent = tl.where(others, logit - reference, LOWEST_BIAS)
        exponential = tl.exp(tl.minimum(exponent, EXPONENT_LIMIT, propagate_nan=tl.PropagateNan.ALL))
        total += exponential
        spread += exponential * exponent
        if STORE:
            value = exponential * factor
            if SLOPED:
                value = tl.where(others, value * slope, 0.0)
            tl.store(out + columns, value.to(out.dtype.element_ty), mask=columns < padded)
    return tl.sum(total, 0), tl.sum(spread, 0)


@jit
def softmax_rows(
    logits,  # (n, P) float32; columns from V on may hold anything
    out,  # (n, P): E′, or E′/(1 + s) for STORE_PROBABILITIES; any pointer for NO_STORE
    bias,  # (V,) any float; any pointer where HAS_BIAS is off
    targets,  # (n,) int32 or int64
    logprobs,  # (n,) float32, this and all below
    entropies,  # (n,)
    wholes,  # (n,) sum of all exponentials
    others,  # (n,) sum of all exponentials but the target's
    references,  # (n,) what exponents are relative to
    padded,
    vocabulary,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    SLOPED: tl.constexpr,  # whether what is stored has the cap's slope as a factor
    BLOCK: tl.constexpr,
):
    """Target-referenced softmax of each row in one read; rows that overflow are read twice more.

    A target out of range gives NaN and touches no foreign memory.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    target = tl.where(known, target, 0).to(tl.int32)
    line = logits + row * padded
    out_line = out + row * padded
    raw = tl.load(line + target)
    own_logit, own_slope = _exponent(raw, bias, target, target >= 0, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    reference = own_logit
    # float16 holds probabilities but not exponentials: it is written by a sweep that knows the sum.
    total, spread = _sweep(
        line,
        out_line,
        bias,
        target,
        reference,
        1.0,
        vocabulary,
        padded,
        scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
        STORE == STORE_EXPONENTIALS,
        SLOPED,
        BLOCK,
    )
    if total > LARGEST_SUM:
        reference = _largest(line, bias, vocabulary, padded, scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        total, spread = _sweep(
            line,
            out_line,
            bias,
            target,
            reference,
            1.0,
            vocabulary,
            padded,
            scale,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            STORE == STORE_EXPONENTIALS,
            SLOPED,
            BLOCK,
        )
    own_exponent = own_logit - reference
    own = tl.exp(own_exponent)
    whole = total + own
    if STORE == STORE_PROBABILITIES:
        _sweep(
            line,
            out_line,
            bias,
            target,
            reference,
            1.0 / whole,
            vocabulary,
            padded,
            scale,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            True,
            SLOPED,
            BLOCK,
        )
    mean = (spread + own * own_exponent) / whole
    log_whole = tl.where(own == 1.0, _log1p(total), tl.log(whole))
    logprob = own_exponent - log_whole
    if STORE:
        own_value = -total
        if SLOPED:
            own_value *= own_slope
        if STORE == STORE_PROBABILITIES:
            own_value /= whole
        tl.debug_barrier()  # after the sweep's zero at this very place
        tl.store(out_line + target, own_value.to(out.dtype.element_ty))
    tl.store(logprobs + row, tl.where(known, logprob, float("nan")))
    tl.store(entropies + row, log_whole - mean)
    tl.store(wholes + row, whole)
    tl.store(others + row, total)
    tl.store(references + row, reference)


@jit
def entropy_rows(
    stored,  # (n, P): what softmax_rows left with SLOPED off; overwritten
    targets,  # (n,) int32 or int64
    logprobs,  # (n,) float32, this and all below; the first five as softmax_rows left them
    entropies,  # (n,)
    wholes,  # (n,)
    others,  # (n,)
    references,  # (n,)
    by_logprob,  # (n,)
    by_entropy,  # (n,)
    padded,
    vocabulary,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place, up to the factor that E has: -∂(by_logprob · logprob + by_entropy · entropy)/∂raw / scale.

    The exponent of a column is the logarithm of what is stored. Its rounding (2^-9 in bfloat16) becomes an
    absolute error of the exponent: like the rounding of the result itself, unless the distribution is nearly
    flat and the entropy's term stands alone. The cap's slope follows from the exponent: no logits are needed.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    target = tl.where((target >= 0) & (target < vocabulary), target, 0).to(tl.int32)
    line = stored + row * padded
    logprob = tl.load(logprobs + row)
    entropy = tl.load(entropies + row)
    whole = tl.load(wholes + row)
    total = tl.load(others + row)
    reference = tl.load(references + row)
    direct = tl.load(by_logprob + row)
    indirect = tl.load(by_entropy + row)
    log_whole = tl.log(whole)
    shift = log_whole * 0.0
    size = whole
    if PROBABILITIES:
        shift = log_whole
        size = whole / whole
    mean = log_whole - entropy
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mine = columns < padded
        value = tl.load(line + columns, mask=mine, other=0.0).to(tl.float32)
        value = tl.where(columns == target, 0.0, value)
        exponent = tl.log(tl.where(value == 0.0, 1.0, value)) + shift
        value *= direct + indirect * (exponent - mean)
        if HAS_SOFTCAP:
            bent = (exponent + reference) / (scale * softcap)
            value *= tl.maximum(1.0 - bent * bent, 0.0)
        tl.store(line + columns, value.to(stored.dtype.element_ty), mask=mine)
    own = size * (indirect * tl.exp(logprob) * (logprob + entropy) - direct * (total / whole))
    if HAS_SOFTCAP:
        bent = (logprob + log_whole + reference) / (scale * softcap)
        own *= tl.maximum(1.0 - bent * bent, 0.0)
    tl.debug_barrier()  # after the loop's zero at this very place
    tl.store(line + target, own.to(stored.dtype.element_ty))
