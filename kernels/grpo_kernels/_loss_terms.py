"""The table of per-token losses in Triton: what ``_loss_kernels`` computes of one token.

Arithmetic is float32. A clamp or a minimum is written with `where`, through which NaN passes: a log-prob
that is no number must show in the loss.
"""
# pyright: reportAttributeAccessIssue=false
# (CONFIG: the checker knows of a constexpr, not of the LossConfig in it)

from typing import Any

import triton
import triton.language as tl

from ._token_loss import GAMMA_FLOOR, RATIO_LIMIT

jit: Any = triton.jit  # the checker cannot follow what it makes of a function

LIMIT = tl.constexpr(RATIO_LIMIT)
LOWEST_PRODUCT = tl.constexpr(GAMMA_FLOOR)


@jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@jit
def rest_of_exp(x):
    """exp(x) - 1 - x, to full relative precision however small x is."""
    tail = 1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9)))
    series = x * x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * tail)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0 - x)


@jit
def _surrogate(logprob, advantage, level, log_product, CONFIG: tl.constexpr):
    """The policy term, its derivative (by the level's log ratio; by the log-prob where the ratio is detached),
    and the ratio."""
    ratio = tl.exp(clamp(level, -LIMIT, LIMIT))
    inside = tl.abs(level) <= LIMIT
    value = -advantage * logprob
    slope = -advantage
    if CONFIG.surrogate == "clip":
        free_gain = ratio * advantage
        if CONFIG.ratio_cap is not None:
            free_gain = tl.where(ratio > CONFIG.ratio_cap, CONFIG.ratio_cap, ratio) * advantage
        bounded_gain = clamp(ratio, 1.0 - CONFIG.clip_low, 1.0 + CONFIG.clip_high) * advantage
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
        log_w = clamp(log_product, LOWEST_PRODUCT, LIMIT)
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
        rest = rest_of_exp(capped)
        growth = rest + capped
        value = rest + growth * (distance - capped)
        slope = -growth
    if CONFIG.kl == "k3_corrected":
        ratio = tl.exp(clamp(log_ratio, -LIMIT, LIMIT))
        slope = ratio * (slope + tl.where(tl.abs(log_ratio) <= LIMIT, value, 0.0))
        value = ratio * value
    return value, slope


@jit
def _mismatch_weight(gap, CONFIG: tl.constexpr):
    """Weight of the surrogate from gap = old - rollout, of the token or the sequence."""
    weight = tl.exp(clamp(gap, -LIMIT, LIMIT))
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
