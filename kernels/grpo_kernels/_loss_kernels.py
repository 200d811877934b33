"""The table of per-token losses as one Triton kernel: the twin of ``_token_loss.evaluate``.

Each program takes the tokens of one sequence where the loss needs sequences, else an equal share of all. It
reads a token's inputs once (twice where a sum over the sequence comes first), writes the derivatives, and
leaves its share of the loss and of the metrics in a column of a small matrix, whose rows a second launch adds
up: no atomics, so the same inputs give the same bits.

Arithmetic is float32. A clamp or a minimum is written with `where`, through which NaN passes: a log-prob
that is no number must show in the loss. N tokens, S sequences, Q programs.
"""
# pyright: reportAttributeAccessIssue=false
# (CONFIG: the checker knows of a constexpr, not of the LossConfig in it)

from typing import Any

import torch
import triton
import triton.language as tl

from ._token_loss import GAMMA_FLOOR, RATIO_LIMIT

jit: Any = triton.jit  # the checker cannot follow what it makes of a function

LIMIT = tl.constexpr(RATIO_LIMIT)
LOWEST_PRODUCT = tl.constexpr(GAMMA_FLOOR)

# Rows of the sums: the loss, then what means over the tokens are made of, then the maxima.
TOTAL, COUNT, FIRST_MAXIMUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(11)


@jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@jit
def _rest_of_exp(x):
    """exp(x) - 1 - x, to full relative precision however small x is."""
    tail = 1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9)))
    series = x * x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * tail)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0 - x)


@jit
def _surrogate(logprob, advantage, level, log_product, CONFIG: tl.constexpr):
    """The policy term, its derivative (by the level's log ratio; by the log-prob where the ratio is detached),
    and the ratio."""
    ratio = tl.exp(_clamp(level, -LIMIT, LIMIT))
    inside = tl.abs(level) <= LIMIT
    value = -advantage * logprob
    slope = -advantage
    if CONFIG.surrogate == "clip":
        free_gain = ratio * advantage
        if CONFIG.ratio_cap is not None:
            free_gain = tl.where(ratio > CONFIG.ratio_cap, CONFIG.ratio_cap, ratio) * advantage
        bounded_gain = _clamp(ratio, 1.0 - CONFIG.clip_low, 1.0 + CONFIG.clip_high) * advantage
        flows = (free_gain <= bounded_gain) & inside
        gain = tl.where(free_gain <= bounded_gain, free_gain, bounded_gain)
        if CONFIG.ratio_cap is not None:
            flows = flows & (ratio <= CONFIG.ratio_cap)
        if CONFIG.dual_clip is not None:
            floor = tl.where(advantage < 0.0, CONFIG.dual_clip * advantage, float("-inf"))
            flows = flows & (gain >= floor)
            gain = tl.where(gain < floor, floor, gain)
        value = -gain
        slope = tl.where(flows, -advantage * ratio, 0.0)
    if CONFIG.surrogate == "cispo":
        high = 1.0 + CONFIG.clip_high
        slope = -advantage * tl.where(ratio > high, high, ratio)
        value = slope * logprob
    if CONFIG.surrogate == "sapo":
        tau = tl.where(advantage >= 0.0, advantage * 0.0 + CONFIG.sapo_tau_pos, CONFIG.sapo_tau_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        value = -advantage * gate * 4.0 / tau
        slope = tl.where(inside, -advantage * ratio * (4.0 * gate * (1.0 - gate)), 0.0)
    if CONFIG.surrogate == "gamma":
        k = tl.where(advantage >= 0.0, advantage * 0.0 + CONFIG.gamma_pos[0], CONFIG.gamma_neg[0])
        lam = tl.where(advantage >= 0.0, advantage * 0.0 + CONFIG.gamma_pos[1], CONFIG.gamma_neg[1])
        log_w = _clamp(log_product, LOWEST_PRODUCT, LIMIT)
        slope = -advantage * tl.exp(lam + k * log_w - lam * tl.exp(log_w))
        value = slope * logprob
    return value, slope, ratio


@jit
def _divergence(distance, log_ratio, CONFIG: tl.constexpr):
    """KL estimate from distance = ref - logprob, and its derivative by the log-prob."""
    value = -distance
    slope = distance * 0.0 + 1.0
    if CONFIG.kl == "k2":
        value = distance * distance / 2
        slope = -distance
    if (CONFIG.kl == "k3") | (CONFIG.kl == "k3_corrected"):
        # exp goes on as its tangent past the limit: finite, and the gradient keeps its sign
        capped = tl.where(distance > LIMIT, LIMIT, distance)
        rest = _rest_of_exp(capped)
        growth = rest + capped
        value = rest + growth * (distance - capped)
        slope = -growth
    if CONFIG.kl == "k3_corrected":
        ratio = tl.exp(_clamp(log_ratio, -LIMIT, LIMIT))
        slope = ratio * (slope + tl.where(tl.abs(log_ratio) <= LIMIT, value, 0.0))
        value = ratio * value
    return value, slope


@jit
def _mismatch_weight(gap, CONFIG: tl.constexpr):
    """Weight of the surrogate from gap = old - rollout, of the token or the sequence."""
    weight = tl.exp(_clamp(gap, -LIMIT, LIMIT))
    if CONFIG.mismatch == "truncate":
        weight = tl.where(weight > CONFIG.mismatch_high, CONFIG.mismatch_high, weight)
    else:
        kept = (weight >= CONFIG.mismatch_low) & (weight <= CONFIG.mismatch_high)
        weight = tl.where(kept, weight, 0.0)
    return weight


@jit
def token_loss(
    logprob,
    advantage,
    log_ratio,  # of the token
    level,  # of what the surrogate looks at: the token, or the mean over its sequence
    log_product,  # log of the product of the sequence's ratios; read by the surrogate gamma
    drift,  # mean of -log_ratio over the sequence; read where CONFIG has an off_policy_threshold
    distance,  # ref - logprob, or None
    gap,  # old - rollout, of the token or the sequence; read where CONFIG has a mismatch
    entropy,  # read where there is a bonus
    top,  # whether the token is among those of highest entropy; read where CONFIG has a quantile
    weight,  # aggregation weight, 0 for an inactive token
    kl_coef,
    entropy_coef,
    CONFIG: tl.constexpr,
):
    """One token's part of the loss; all arguments blocks of one shape, or scalars, in float32.

    Returns the loss, its derivatives through the surrogate, the divergence and the entropy, then the ratio,
    the divergence, the mismatch weight and the weight that the surrogate kept.
    """
    value, slope, ratio = _surrogate(logprob, advantage, level, log_product, CONFIG)
    kept = weight
    correction = weight * 0.0
    if CONFIG.mismatch != "none":
        correction = _mismatch_weight(gap, CONFIG)
        kept = kept * correction
    if CONFIG.entropy_quantile is not None:
        kept = tl.where(top, kept, 0.0)
    if CONFIG.off_policy_threshold is not None:
        kept = tl.where((advantage < 0.0) & (drift > CONFIG.off_policy_threshold), 0.0, kept)
    loss = kept * value
    divergence = weight * 0.0
    by_divergence = weight * 0.0
    if distance is not None:
        divergence, divergence_slope = _divergence(distance, log_ratio, CONFIG)
        if CONFIG.kl_coef != 0.0:
            loss += kl_coef * weight * divergence
            by_divergence = kl_coef * weight * divergence_slope
    by_entropy = weight * 0.0
    if CONFIG.entropy_coef != 0.0:
        by_entropy = -entropy_coef * weight
        loss += by_entropy * entropy
    return loss, kept * slope, by_divergence, by_entropy, ratio, divergence, correction, kept


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
            gap_sums += tl.abs(own_gap)
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
        tl.store(column + 11 * programs, tl.max(ratio_max, 0))
        tl.store(column + 12 * programs, tl.max(gap_max, 0))


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
