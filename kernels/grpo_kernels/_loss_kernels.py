"""The losses of all tokens as one Triton kernel: the twin of ``_token_loss.evaluate``.

Each program takes the tokens of one sequence where the loss needs sequences, else an equal share of all. It
reads a token's inputs once (twice where a sum over the sequence comes first), writes the derivatives, and
leaves its share of the loss and of the metrics in a column of a small matrix, whose rows a second launch adds
up: no atomics, so the same inputs give the same bits.

One token's part of the loss is in ``_loss_terms``. Arithmetic is float32. N tokens, S sequences, Q programs.
"""
# pyright: reportAttributeAccessIssue=false
# (CONFIG: the checker knows of a constexpr, not of the LossConfig in it)

import torch
import triton.language as tl

from ._loss_terms import LIMIT, clamp, jit, rest_of_exp, token_loss

# Rows of the sums: the loss, then what means over the tokens are made of, then the maxima.
TOTAL, COUNT, FIRST_MAXIMUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(14)


@jit
def _take(values, index, inside, active):
    """Where active, else 0: an inactive token may hold anything."""
    return tl.where(active, tl.load(values + index, mask=inside, other=0.0), 0.0)


@jit
def _who(loss_mask, advantages, index, inside, program, BY_SEQUENCE: tl.constexpr, SKIP_ZERO: tl.constexpr):
    """Which tokens are in the loss mask, which of these are active, and the advantages of those."""
    counted = inside
    if loss_mask is not None:
        counted = inside & (tl.load(loss_mask + index, mask=inside, other=0) != 0)
    place = index
    if BY_SEQUENCE:
        place = index * 0 + program
    advantage = _take(advantages, place, inside, counted)
    active = counted
    if SKIP_ZERO:
        active = counted & (advantage != 0.0)
    return counted, active, advantage


@jit
def token_losses(
    logprobs,  # (N,) float32, as are all below that no other type is given for
    advantages,  # (N,), or (S,) with BY_SEQUENCE
    old,  # (N,) or None: the log-probs themselves
    ref,  # (N,) or None
    rollout,  # (N,) or None
    entropies,  # (N,) or None
    top,  # (N,) uint8 or None: the tokens of highest entropy
    loss_mask,  # (N,) integers or None: all count
    weights,  # (N,) or None: by the aggregation and the divisor
    cu_seqlens,  # (S+1,) int32 or int64, or None
    normalizer,  # one number of any type, or None: the divisor
    divisor,
    kl_coef,
    entropy_coef,
    losses,  # (N,) out, or None
    by_logprob,  # (N,) out
    by_entropy,  # (N,) out, or None
    partials,  # (ROWS, Q) out, or None
    count,
    share,  # tokens of a program, without SEQUENCES
    CONFIG: tl.constexpr,
    SEQUENCES: tl.constexpr,  # a program takes a sequence
    BY_SEQUENCE: tl.constexpr,
    SKIP_ZERO: tl.constexpr,  # tokens of advantage 0 are inactive
    SUMS: tl.constexpr,  # sums over the sequence are needed before its tokens
    SHARED_SLOPE: tl.constexpr,  # the surrogate differentiates the sequence's ratio
    BLOCK: tl.constexpr,
):
    """Losses of tokens and their derivatives; each program's share of the sums."""
    program = tl.program_id(0)
    if SEQUENCES:
        start = tl.load(cu_seqlens + program).to(tl.int64)
        stop = tl.load(cu_seqlens + program + 1).to(tl.int64)
    else:
        start = program.to(tl.int64) * share
        stop = tl.minimum(start + share, count)
    length = (stop - start).to(tl.int32)
    lanes = tl.arange(0, BLOCK)

    members = 1.0
    log_product = 0.0
    mean_log_ratio = 0.0
    mean_gap = 0.0
    if SUMS:
        counts = tl.zeros((BLOCK,), tl.float32)
        log_ratios = tl.zeros((BLOCK,), tl.float32)
        gaps = tl.zeros((BLOCK,), tl.float32)
        for offset in range(0, length, BLOCK):
            inside = offset + lanes < length
            index = start + offset + lanes
            counted, active, _ = _who(loss_mask, advantages, index, inside, program, BY_SEQUENCE, SKIP_ZERO)
            counts += counted.to(tl.float32)
            if CONFIG.couples_sequences:
                before = _take(logprobs, index, inside, active)
                if old is not None:
                    log_ratios += before
                    before = _take(old, index, inside, active)
                    log_ratios -= before
                if CONFIG.mismatch == "sequence_mask":
                    gaps += before - _take(rollout, index, inside, active)
        members = tl.maximum(tl.sum(counts, 0), 1.0)
        log_product = tl.sum(log_ratios, 0)
        mean_log_ratio = log_product / members
        mean_gap = tl.sum(gaps, 0) / members

    if normalizer is not None:
        divisor = tl.load(normalizer).to(tl.float32)
    each = 1.0 / divisor
    if CONFIG.aggregation == "sequence_mean":
        each = 1.0 / members / divisor

    zeros = tl.zeros((BLOCK,), tl.float32)
    total = zeros
    tokens = zeros
    low = zeros
    high = zeros
    ratios = zeros
    clamped = zeros
    dropped = zeros
    divergences = zeros
    entropy_sums = zeros
    corrections = zeros
    gap_sums = zeros
    signed_gaps = zeros
    gap_rests = zeros
    gap_squares = zeros
    ratio_max = zeros
    gap_max = zeros
    slopes = zeros
    for offset in range(0, length, BLOCK):
        inside = offset + lanes < length
        index = start + offset + lanes
        counted, active, advantage = _who(
            loss_mask, advantages, index, inside, program, BY_SEQUENCE, SKIP_ZERO
        )
        weight = tl.where(active, each, 0.0)
        if weights is not None:
            weight = _take(weights, index, inside, active)
        logprob = _take(logprobs, index, inside, active)
        before = logprob
        if old is not None:
            before = _take(old, index, inside, active)
        log_ratio = logprob - before
        level = log_ratio
        if CONFIG.ratio_level == "sequence":
            level = zeros + mean_log_ratio
        distance = None
        if ref is not None:
            distance = _take(ref, index, inside, active) - logprob
        own_gap = zeros
        if rollout is not None:
            own_gap = before - _take(rollout, index, inside, active)
        gap = own_gap
        if CONFIG.mismatch == "sequence_mask":
            gap = zeros + mean_gap
        entropy = zeros
        if entropies is not None:
            entropy = _take(entropies, index, inside, active)
        chosen = active
        if top is not None:
            chosen = tl.load(top + index, mask=inside, other=0) != 0
        loss, slope, by_divergence, by_own_entropy, ratio, divergence, correction, kept = token_loss(
            logprob,
            advantage,
            log_ratio,
            level,
            zeros + log_product,
            zeros - mean_log_ratio,
            distance,
            gap,
            entropy,
            chosen,
            weight,
            kl_coef,
            entropy_coef,
            CONFIG,
        )
        if SHARED_SLOPE:
            slopes += slope
            slope = zeros
        tl.store(by_logprob + index, slope + by_divergence, mask=inside)
        if by_entropy is not None:
            tl.store(by_entropy + index, by_own_entropy, mask=inside)
        if losses is not None:
            tl.store(losses + index, loss, mask=inside)
        if partials is not None:
            total += loss
            tokens += active.to(tl.float32)
            below = (ratio < 1.0 - CONFIG.clip_low) & (advantage < 0.0)
            above = (ratio > 1.0 + CONFIG.clip_high) & (advantage > 0.0)
            low += (active & below).to(tl.float32)
            high += (active & above).to(tl.float32)
            ratios += tl.where(active, ratio, 0.0)
            clamped += (active & (tl.abs(level) > LIMIT)).to(tl.float32)
            dropped += (active & (kept == 0.0) & (weight != 0.0)).to(tl.float32)
            divergences += tl.where(active, divergence, 0.0)
            entropy_sums += entropy
            corrections += tl.where(active, correction, 0.0)
            if rollout is not None:
                bounded = clamp(own_gap, -LIMIT, LIMIT)
                gap_sums += tl.abs(own_gap)
                signed_gaps -= own_gap
                gap_rests += rest_of_exp(bounded)
                gap_squares += tl.where(active, tl.exp(2 * bounded), 0.0)
            ratio_max = tl.maximum(ratio_max, tl.where(active, ratio, 0.0))
            gap_max = tl.maximum(gap_max, tl.abs(own_gap))

    if SHARED_SLOPE:
        # every token of a sequence moves the one ratio that all of its terms share
        shared = tl.sum(slopes, 0) / members
        tl.debug_barrier()  # after the stores of the loop above
        for offset in range(0, length, BLOCK):
            inside = offset + lanes < length
            index = start + offset + lanes
            _, active, _ = _who(loss_mask, advantages, index, inside, program, BY_SEQUENCE, SKIP_ZERO)
            slope = tl.load(by_logprob + index, mask=inside, other=0.0)
            tl.store(by_logprob + index, slope + tl.where(active, shared, 0.0), mask=inside)

    if partials is not None:
        programs = tl.num_programs(0)
        column = partials + program
        tl.store(column, tl.sum(total, 0))
        tl.store(column + programs, tl.sum(tokens, 0))
        tl.store(column + 2 * programs, tl.sum(low, 0))
        tl.store(column + 3 * programs, tl.sum(high, 0))
        tl.store(column + 4 * programs, tl.sum(ratios, 0))
        tl.store(column + 5 * programs, tl.sum(clamped, 0))
        tl.store(column + 6 * programs, tl.sum(dropped, 0))
        tl.store(column + 7 * programs, tl.sum(divergences, 0))
        tl.store(column + 8 * programs, tl.sum(entropy_sums, 0))
        tl.store(column + 9 * programs, tl.sum(corrections, 0))
        tl.store(column + 10 * programs, tl.sum(gap_sums, 0))
        tl.store(column + 11 * programs, tl.sum(signed_gaps, 0))
        tl.store(column + 12 * programs, tl.sum(gap_rests, 0))
        tl.store(column + 13 * programs, tl.sum(gap_squares, 0))
        tl.store(column + 14 * programs, tl.max(ratio_max, 0))
        tl.store(column + 15 * programs, tl.max(gap_max, 0))


@jit
def combine_partials(
    partials,  # (ROWS, Q) float32
    found,  # (ROWS,) float32 out: the total, means over the tokens, maxima
    tokens,  # (1,) int64 out
    programs,
    BLOCK: tl.constexpr,
):
    """Adds up each program's share of one sum; one program a row. In float64, so that any count is exact."""
    row = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.float64)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < programs
        values = tl.load(partials + row * programs + column, mask=inside, other=0.0)
        counts += tl.load(partials + COUNT * programs + column, mask=inside, other=0.0).to(tl.float64)
        sums += values.to(tl.float64)
        most = tl.maximum(most, values)
    count = tl.sum(counts, 0)
    result = tl.sum(sums, 0)
    if row != TOTAL:
        result = result / tl.maximum(count, 1.0)
    if row >= FIRST_MAXIMUM:
        result = tl.max(most, 0).to(tl.float64)
    tl.store(found + row, result.to(tl.float32))
    if row == COUNT:
        tl.store(tokens, count.to(tl.int64))


def require_gpu(device: torch.device) -> None:
    """Raises ValueError for tensors off the GPU, unless Triton interprets its kernels."""
    interpreted = type(token_losses).__name__ == "InterpretedFunction"  # decided at its definition
    if device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, got {device.type}; "
            "set TRITON_INTERPRET=1 before the first import of triton to run it in the interpreter"
        )
