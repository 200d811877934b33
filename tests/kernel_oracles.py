"""The kernels' formulas once more, in float64 and as plain as can be: what the tests hold to be true.

Nothing here comes from ``grpo_kernels.reference``, which is itself under test. The head goes through
autograd; the loss is written token by token with ``math``, its derivatives by hand.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from grpo_kernels import LossConfig
from torch import Tensor


def head_oracle(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, (N,) float64, differentiable by what carries a gradient."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    every = torch.log_softmax(z * logit_scale / temperature, -1)
    return every[torch.arange(len(z)), targets.long()], -(every.exp() * every).sum(-1)


@dataclass
class Batch:
    """Packed tokens as lists of floats, with everything a loss may ask for."""

    logprobs: list[float]
    advantages: list[float]  # per token
    old: list[float]
    ref: list[float]
    rollout: list[float]
    entropy: list[float]
    mask: list[bool]
    bounds: list[int]

    def keywords(self, dtype: torch.dtype, *, entropy: bool = True) -> dict[str, Any]:
        """Arguments of ``grpo_loss`` beyond log-probs, advantages and config."""
        given = {
            "old_logprobs": torch.tensor(self.old, dtype=dtype),
            "ref_logprobs": torch.tensor(self.ref, dtype=dtype),
            "rollout_logprobs": torch.tensor(self.rollout, dtype=dtype),
            "loss_mask": torch.tensor(self.mask),
            "cu_seqlens": torch.tensor(self.bounds, dtype=torch.int32),
        }
        return given | ({"entropy": torch.tensor(self.entropy, dtype=dtype)} if entropy else {})


@dataclass
class Truth:
    """What a loss must give."""

    loss: float
    by_logprob: list[float]
    by_entropy: list[float]
    metrics: dict[str, float] = field(default_factory=dict)


def loss_oracle(config: LossConfig, batch: Batch, normalizer: float | None = None) -> Truth:
    """Loss, its derivatives by log-probs and entropies, and the metrics."""
    count = len(batch.logprobs)
    counted = [t for t in range(count) if batch.mask[t]]
    if normalizer is None:
        normalizer = len(batch.bounds) - 1 if config.aggregation == "sequence_mean" else max(1, len(counted))
    least_entropy = -math.inf
    if config.entropy_quantile is not None and counted:
        ranked = sorted((batch.entropy[t] for t in counted), reverse=True)
        least_entropy = ranked[math.ceil(config.entropy_quantile * len(ranked)) - 1]

    loss, by_logprob, by_entropy = 0.0, [0.0] * count, [0.0] * count
    ratios, kls, weights, levels, dropped, clipped = [], [], [], [], [], []
    for first, last in pairwise(batch.bounds):
        here = [t for t in range(first, last) if batch.mask[t]]
        log_ratio = {t: batch.logprobs[t] - batch.old[t] for t in here}
        gap = {t: batch.old[t] - batch.rollout[t] for t in here}
        for t in here:
            share = 1 / len(here) if config.aggregation == "sequence_mean" else 1.0
            share /= normalizer
            advantage, logprob = batch.advantages[t], batch.logprobs[t]
            level = _mean(log_ratio.values()) if config.ratio_level == "sequence" else log_ratio[t]
            keep = 1.0
            if config.mismatch != "none":
                keep = _mismatch(config, _mean(gap.values()) if "sequence" in config.mismatch else gap[t])
                weights.append(keep)
            if batch.entropy[t] < least_entropy:
                keep = 0.0
            drift = -_mean(log_ratio.values())
            if (
                config.off_policy_threshold is not None
                and advantage < 0
                and drift > config.off_policy_threshold
            ):
                keep = 0.0
            value, slope, moves_ratio = _surrogate(config, advantage, logprob, level, sum(log_ratio.values()))
            loss += share * keep * value
            if config.ratio_level == "sequence" and moves_ratio:
                for other in here:  # the mean log ratio moves with each of its tokens
                    by_logprob[other] += share * keep * slope / len(here)
            else:
                by_logprob[t] += share * keep * slope
            kl, kl_slope = _divergence(config, batch.ref[t] - logprob, log_ratio[t])
            loss += share * (config.kl_coef * kl - config.entropy_coef * batch.entropy[t])
            by_logprob[t] += share * config.kl_coef * kl_slope
            by_entropy[t] = -share * config.entropy_coef
            ratio = math.exp(_clamp(level, 20))
            low, high = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
            ratios.append(ratio)
            levels.append(level)
            kls.append(kl)
            dropped.append(keep == 0.0)
            clipped.append((low and advantage < 0, high and advantage > 0))
    gaps = [batch.old[t] - batch.rollout[t] for t in counted]
    metrics = {
        "tokens": float(len(counted)),
        "kl": _mean(kls),
        "ratio_mean": _mean(ratios),
        "ratio_max": max(ratios, default=0.0),
        "clip_low_frac": _mean(low for low, _ in clipped),
        "clip_high_frac": _mean(high for _, high in clipped),
        "clamped_frac": _mean(abs(level) > 20 for level in levels),
        "dropped_frac": _mean(dropped),
        "entropy": _mean(batch.entropy[t] for t in counted),
        "mismatch_mean": _mean(abs(gap) for gap in gaps),
        "mismatch_k1": _mean(-gap for gap in gaps),
        "mismatch_k3": _mean(math.expm1(_clamp(gap, 20)) - _clamp(gap, 20) for gap in gaps),
        "mismatch_square": _mean(math.exp(2 * _clamp(gap, 20)) for gap in gaps),
        "mismatch_max": max((abs(gap) for gap in gaps), default=0.0),
    }
    if config.mismatch != "none":
        metrics["mismatch_weight"] = _mean(weights)
    return Truth(loss, by_logprob, by_entropy, metrics)


def _surrogate(
    config: LossConfig, advantage: float, logprob: float, level: float, log_product: float
) -> tuple[float, float, bool]:
    """Value, derivative, and whether that is by the log ratio (else by the token's own log-prob)."""
    ratio = math.exp(_clamp(level, 20))
    moving = 1.0 if abs(level) <= 20 else 0.0
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.surrogate == "clip":
        free, slope = ratio, ratio * moving
        if config.ratio_cap is not None and ratio > config.ratio_cap:
            free, slope = config.ratio_cap, 0.0
        gain, gain_slope = free * advantage, slope * advantage
        bounded = min(max(ratio, low), high) * advantage
        if bounded < gain:  # only where the ratio left the interval, so it stands still
            gain, gain_slope = bounded, 0.0
        if config.dual_clip is not None and advantage < 0 and gain < config.dual_clip * advantage:
            gain, gain_slope = config.dual_clip * advantage, 0.0
        return -gain, -gain_slope, True
    if config.surrogate == "sapo":
        tau = config.sapo_tau_pos if advantage >= 0 else config.sapo_tau_neg
        gate = 1 / (1 + math.exp(-_clamp(tau * (ratio - 1), 700)))
        sech = 1 / math.cosh(_clamp(tau * (ratio - 1) / 2, 350))
        return -advantage * gate * 4 / tau, -advantage * ratio * moving * sech**2, True
    if config.surrogate == "cispo":
        factor = min(ratio, high)
    elif config.surrogate == "gamma":
        k, lam = config.gamma_pos if advantage >= 0 else config.gamma_neg
        w = math.exp(min(max(log_product, math.log(1e-8)), 20))
        factor = math.exp(lam) * w**k * math.exp(-lam * w)
    else:
        factor = 1.0
    return -factor * advantage * logprob, -factor * advantage, False


def _divergence(config: LossConfig, d: float, log_ratio: float) -> tuple[float, float]:
    """Value and derivative by the log-prob, d = ref - logprob."""
    if config.kl == "k1":
        return -d, 1.0
    if config.kl == "k2":
        return d * d / 2, -d
    if d > 20:  # exp goes on as its tangent
        value, slope = math.expm1(20) + math.exp(20) * (d - 20) - d, 1 - math.exp(20)
    else:
        value, slope = math.expm1(d) - d, 1 - math.exp(d)
    if config.kl == "k3":
        return value, slope
    ratio = math.exp(_clamp(log_ratio, 20))
    return ratio * value, ratio * slope + (ratio * value if abs(log_ratio) <= 20 else 0.0)


def _mismatch(config: LossConfig, gap: float) -> float:
    weight = math.exp(_clamp(gap, 20))
    if config.mismatch == "truncate":
        return min(weight, config.mismatch_high)
    return weight if config.mismatch_low <= weight <= config.mismatch_high else 0.0


def _clamp(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


def _mean(values: Any) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else 0.0


def around(logprobs: Tensor, entropy: Tensor, *, seed: int = 0) -> Batch:
    """A batch of 29 tokens about given log-probs (29,): 8 sequences, one empty, one of one token, one masked.

    Ratios from within 1e-4 of one to far beyond every clip and clamp, for advantages of both signs.
    """
    bounds = [0, 5, 5, 6, 12, 16, 20, 25, 29]
    make = torch.Generator().manual_seed(seed)
    count = len(logprobs)
    assert count == bounds[-1]

    def noise() -> Tensor:
        return torch.randn(count, generator=make, dtype=torch.float64)

    lp = logprobs.detach().double()
    old = lp + 0.4 * noise()
    old[6:12] = lp[6:12] + 1e-4 * noise()[6:12]  # inside the clip range of GSPO
    old[16:20] = lp[16:20] + 0.8 + 0.1 * noise()[16:20]  # the policy has moved off
    old[25], old[26] = lp[25] - 25.0, lp[26] + 25.0  # beyond the clamp
    old[27], old[28] = lp[27] - 1.6, lp[28] - 1.6  # beyond ratio_cap and dual_clip
    ref = lp + 0.5 * noise()
    ref[3], ref[24] = lp[3] - 30.0, lp[24] + 30.0
    advantages = noise()
    advantages[25:29] = torch.tensor([0.7, -1.1, -0.9, 0.6])
    advantages[16:20] = -advantages[16:20].abs()
    mask = torch.ones(count, dtype=torch.bool)
    mask[[1, 4, 9]] = False
    mask[12:16] = False
    return Batch(
        logprobs=lp.tolist(),
        advantages=advantages.tolist(),
        old=old.tolist(),
        ref=ref.tolist(),
        rollout=(old + 0.5 * noise()).tolist(),
        entropy=entropy.detach().double().tolist(),
        mask=mask.tolist(),
        bounds=bounds,
    )


# Every preset, then every row of the table of losses, alone and with the rows it could disagree with.
LOSSES: dict[str, LossConfig] = {
    **{name: LossConfig.preset(name) for name in ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo")},
    **{name: LossConfig.preset(name) for name in ("vespo", "luspo", "rloo", "reinforce_pp")},
    "token-mean-grpo": LossConfig(aggregation="token_mean"),
    "constant-grpo": LossConfig(aggregation="constant"),
    "ratio-cap": LossConfig(ratio_cap=3.0, kl_coef=0.0),
    "dual-clip": LossConfig(dual_clip=3.0, kl_coef=0.0),
    "cap-and-dual-clip": LossConfig(ratio_cap=6.0, dual_clip=3.0, clip_high=0.28),
    "sequence-wide-clip": LossConfig(ratio_level="sequence", aggregation="token_mean"),
    "sequence-dual-clip": LossConfig(ratio_level="sequence", dual_clip=1.5, kl_coef=0.0),
    "sequence-ratio-cap": LossConfig(ratio_level="sequence", ratio_cap=1.5, kl_coef=0.0),
    "sequence-cispo": LossConfig(ratio_level="sequence", surrogate="cispo", kl="k1"),
    "sequence-sapo": LossConfig(ratio_level="sequence", surrogate="sapo", kl="k2"),
    "k1": LossConfig(kl="k1", kl_coef=0.5),
    "k2": LossConfig(kl="k2", kl_coef=0.5),
    "k3": LossConfig(kl="k3", kl_coef=0.5),
    "k3-corrected": LossConfig(kl="k3_corrected", kl_coef=0.5),
    "gamma-kl": LossConfig(surrogate="gamma", gamma_pos=(1.1, 2.3), gamma_neg=(2.7, 1.9), kl_coef=0.1),
    "truncate": LossConfig(mismatch="truncate", mismatch_high=1.3),
    "mask": LossConfig(mismatch="mask", mismatch_low=0.7, mismatch_high=1.5),
    "sequence-mask": LossConfig(mismatch="sequence_mask", mismatch_low=0.9, mismatch_high=1.1),
    "sequence-mask-gspo": LossConfig.preset("gspo", mismatch="sequence_mask", mismatch_low=0.9),
    "entropy-quantile": LossConfig(entropy_quantile=0.2),
    "entropy-quantile-gspo": LossConfig.preset("gspo", entropy_quantile=0.6, clip_low=0.5, clip_high=0.5),
    "off-policy": LossConfig(off_policy_threshold=0.3),
    "off-policy-dapo": LossConfig.preset("dapo", off_policy_threshold=0.3, mismatch="mask"),
    "entropy-bonus": LossConfig(entropy_coef=0.03),
    "entropy-bonus-gspo": LossConfig.preset("gspo", entropy_coef=0.03, entropy_quantile=0.5),
    "everything": LossConfig(
        clip_high=0.28,
        ratio_cap=4.0,
        dual_clip=3.0,
        kl="k3_corrected",
        mismatch="truncate",
        entropy_quantile=0.7,
        off_policy_threshold=0.2,
        entropy_coef=0.01,
        aggregation="constant",
    ),
}


def normalizer_of(config: LossConfig) -> float | None:
    """A constant where the aggregation needs one."""
    return 13.0 if config.aggregation == "constant" else None
