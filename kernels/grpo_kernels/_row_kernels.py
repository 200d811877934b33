"""Triton kernels over rows of logits: one program a row, whatever the vocabulary.

Written in the subset that the interpreter runs: no inline assembly, no libdevice, no autotuning; reductions and
arithmetic in float32 whatever is stored. Row offsets are 64-bit: rows times vocabulary passes 2^31.
"""

import triton
import triton.language as tl

LOG_LIMIT = tl.constexpr(
    41.0
)  # about log 2^59: an exponent beyond has its row redone against the row maximum
LOWEST_BIAS = tl.constexpr(-1e30)  # stands for -inf: its exponential is 0, and 0 · LOWEST_BIAS is no NaN


@triton.jit
def _logit(raw, bias, columns, inside, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Exponent of a raw product, and the derivative of the soft cap there."""
    slope = raw * 0.0 + 1.0
    if HAS_BIAS:
        raw += tl.maximum(tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32), LOWEST_BIAS)
    if HAS_SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(raw / softcap))
        bent = (1.0 - decay) / (1.0 + decay)
        slope = 1.0 - bent * bent
        raw = tl.where(raw < 0.0, -bent, bent) * softcap
    return raw * scale, slope


@triton.jit
def _sweep(
    line,
    out,
    bias,
    target,
    reference,
    vocabulary,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Over all columns but the target: sum of exponentials, sum of exponential times exponent, largest exponent."""
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        raw = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
        logit, slope = _logit(raw, bias, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        exponent = logit - reference
        others = inside & (columns != target)
        exponential = tl.where(others, tl.exp(tl.minimum(exponent, LOG_LIMIT)), 0.0)
        total += exponential
        spread += exponential * exponent
        highest = tl.maximum(highest, tl.where(others, exponent, float("-inf")))
        if STORE:
            tl.store(out + columns, (exponential * slope).to(out.dtype.element_ty), mask=others)
    return tl.sum(total, 0), tl.sum(spread, 0), tl.max(highest, 0)


@triton.jit
def softmax_rows(
    logits,  # (n, V) float32, rows apart by logits_stride
    out,  # (n, V): E′, rows apart by out_stride; any pointer where STORE is off
    bias,  # (V,) any float; any pointer where HAS_BIAS is off
    targets,  # (n,) int64
    logprobs,  # (n,) float32, this and all below
    entropies,  # (n,)
    others,  # (n,) sum of the exponentials but the target's
    wholes,  # (n,) sum of them all
    means,  # (n,) exponent averaged under the softmax
    references,  # (n,) what exponents are relative to
    logits_stride,
    out_stride,
    vocabulary,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Target-referenced softmax of each row in one read; rows that overflow are read again. NaN for bad targets."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    target = tl.where(known, target, 0).to(tl.int32)
    line = logits + row * logits_stride
    out_line = out + row * out_stride
    raw = tl.load(line + target).to(tl.float32)
    own_logit, own_slope = _logit(raw, bias, target, target >= 0, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    reference = own_logit
    own_exponent = own_logit * 0.0
    total, spread, highest = _sweep(
        line,
        out_line,
        bias,
        target,
        reference,
        vocabulary,
        scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
        STORE,
        BLOCK,
    )
    if highest > LOG_LIMIT:
        reference = own_logit + highest
        own_exponent = -highest
        total, spread, highest = _sweep(
            line,
            out_line,
            bias,
            target,
            reference,
            vocabulary,
            scale,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            STORE,
            BLOCK,
        )
    own = tl.exp(own_exponent)
    whole = total + own
    mean = (spread + own * own_exponent) / whole
    # log(1 + x) to full precision: the rounding of 1 + x cancels between the logarithm and the quotient.
    gained = whole - own
    log_whole = tl.where((own == 1.0) & (gained > 0.0), tl.log(whole) * (total / gained), tl.log(whole))
    log_whole = tl.where((own == 1.0) & (gained == 0.0), total, log_whole)
    if STORE:
        tl.store(out_line + target, (-total * own_slope).to(out.dtype.element_ty))
    tl.store(logprobs + row, tl.where(known, own_exponent - log_whole, float("nan")))
    tl.store(entropies + row, log_whole - mean)
    tl.store(others + row, total)
    tl.store(wholes + row, whole)
    tl.store(means + row, mean)
    tl.store(references + row, reference)


@triton.jit
def gradient_rows(
    logits,  # as in softmax_rows
    out,
    bias,
    targets,
    others,
    wholes,
    means,
    references,
    by_logprob,  # (n,) float32
    by_entropy,  # (n,) float32
    logits_stride,
    out_stride,
    vocabulary,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-derivative of by_logprob · logprob + by_entropy · entropy by the raw product, over scale.

    The second read of the logits: for the entropy's gradient, which needs the whole row first, and for float16,
    whose range holds probabilities but not exponentials.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    target = tl.where((target >= 0) & (target < vocabulary), target, 0).to(tl.int32)
    line = logits + row * logits_stride
    reference = tl.load(references + row)
    total = tl.load(others + row)
    mean = tl.load(means + row)
    direct = tl.load(by_logprob + row)
    indirect = tl.load(by_entropy + row)
    whole = tl.load(wholes + row)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        raw = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
        logit, slope = _logit(raw, bias, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        exponent = logit - reference
        chance = tl.exp(tl.minimum(exponent, LOG_LIMIT)) / whole
        pull = tl.where(columns == target, -total / whole, chance)
        value = (direct * pull + indirect * chance * (exponent - mean)) * slope
        tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)
