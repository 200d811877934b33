"""The table of per-token losses: value and derivative by the token's log-prob, written out.

N tokens, S sequences. Everything here is elementwise over N (or a sum over a sequence), tiny beside the
product with the vocabulary. ``_triton_loss`` is the same table as one Triton kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._loss_arguments import Arguments, check, require_entropy
from .loss_config import LossConfig

RATIO_LIMIT = 20.0  # |log ratio| beyond this is clamped and has no gradient
GAMMA_FLOOR = -18.420680743952367  # log 1e-8


def metric_names(config: LossConfig, *, ref: bool, rollout: bool, entropy: bool) -> tuple[str, ...]:
    """Names of what `evaluate` measures, in a fixed order, given which inputs there are."""
    names = (
        "tokens",
        "clip_low_frac",
        "clip_high_frac",
        "ratio_mean",
        "ratio_max",
        "clamped_frac",
        "dropped_frac",
    )
    given = {
        "kl": ref,
        "entropy": entropy,
        "mismatch_weight": config.mismatch != "none",
        "mismatch_mean": rollout,
        "mismatch_k1": rollout,
        "mismatch_k3": rollout,
        "mismatch_square": rollout,
        "mismatch_max": rollout,
    }
    return (*names, *(name for name, there in given.items() if there))


@dataclass(frozen=True)
class Tokens:
    """What the loss knows of each token before its log-prob. All (N,) tensors of the accumulation dtype."""

    advantages: Tensor
    weights: Tensor  # aggregation weight over the normalizer; 0 where masked
    active: Tensor  # bool: in the loss mask and not without effect
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None
    sequence: Tensor | None  # int64 index of each token's sequence
    cu_seqlens: Tensor | None  # (S+1,) int64

    def rows(self, index: slice | Tensor) -> "Tokens":
        """The tokens of a slice or an index; without the sequence boundaries, which no longer hold."""

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return Tokens(
            advantages=self.advantages[index],
            weights=self.weights[index],
            active=self.active[index],
            old=pick(self.old),
            ref=pick(self.ref),
            rollout=pick(self.rollout),
            sequence=None,
            cu_seqlens=None,
        )


@dataclass(frozen=True)
class TokenLoss:
    """Loss of each token and its derivatives, weights included."""

    loss: Tensor  # (N,)
    by_logprob: Tensor  # (N,)
    by_entropy: Tensor | None  # (N,), None when the entropy carries no gradient
    metrics: dict[str, Tensor]


def prepare(config: LossConfig, count: int, advantages: Tensor, **given: Any) -> Tokens:
    """Arguments as ``check`` takes them, in per-token form."""
    return per_token_form(config, count, check(config, count, advantages, **given))


def per_token_form(config: LossConfig, count: int, arguments: Arguments) -> Tokens:
    """The same for each of N = count tokens."""
    advantages, device = arguments.advantages, arguments.advantages.device
    sequence = bounds = None
    if arguments.cu_seqlens is not None:
        bounds = arguments.cu_seqlens.long()
        sequence = torch.searchsorted(bounds, torch.arange(count, device=device), right=True) - 1
    if arguments.loss_mask is None:
        counted = torch.ones(count, dtype=torch.bool, device=device)
    else:
        counted = arguments.loss_mask != 0
    if arguments.by_sequence:
        assert sequence is not None
        advantages = advantages[sequence]
    advantages = torch.where(counted, advantages, 0.0)  # a masked token may hold anything

    # A token without advantage carries nothing, unless another term acts on it or others average over it.
    active = counted
    if config.skips_zero_advantage(arguments.by_sequence):
        active = counted & (advantages != 0)

    weights = counted.to(advantages.dtype)
    divisor = arguments.divisor
    if divisor is None:
        divisor = weights.sum().clamp(min=1.0)
    if config.aggregation == "sequence_mean":
        assert sequence is not None and bounds is not None
        weights = weights / sequence_sum(weights, bounds).clamp(min=1.0)[sequence]
    return Tokens(
        advantages=advantages,
        weights=weights / divisor,
        active=active,
        old=arguments.old,
        ref=arguments.ref,
        rollout=arguments.rollout,
        sequence=sequence,
        cu_seqlens=bounds,
    )


def sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of (N,) values over each sequence: (S,). Deterministic, no synchronisation."""
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, unsafe=True, initial=0)


def sequence_mean(values: Tensor, tokens: Tokens) -> Tensor:
    """Mean over the active tokens of each token's sequence, at every token: (N,)."""
    assert tokens.cu_seqlens is not None and tokens.sequence is not None
    count = sequence_sum(tokens.active.to(values.dtype), tokens.cu_seqlens).clamp(min=1.0)
    total = sequence_sum(torch.where(tokens.active, values, 0.0), tokens.cu_seqlens)
    return (total / count)[tokens.sequence]


@dataclass(frozen=True)
class _Point:
    """Where a surrogate is evaluated; all (N,)."""

    logprobs: Tensor
    advantages: Tensor
    log_ratio: Tensor  # of the chosen level, unclamped
    ratio: Tensor
    inside: Tensor  # 1 where the clamp on the log ratio is not at work, else 0
    log_product: Tensor | None  # log of the product of the sequence's ratios (surrogate gamma)


def _by_sign(advantages: Tensor, not_negative: float, negative: float) -> Tensor:
    # two Python numbers would make `where` round them to the default dtype
    return torch.where(advantages >= 0, advantages.new_full((), not_negative), negative)


# Each row returns (loss, d loss / d log-ratio or log-prob). A surrogate that detaches its ratio differentiates by
# the token's own log-prob; the others by the log ratio, whatever its level.
def _clip(at: _Point, config: LossConfig) -> tuple[Tensor, Tensor]:
    free = at.ratio if config.ratio_cap is None else at.ratio.clamp(max=config.ratio_cap)
    bounded = at.ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    free_gain, bounded_gain = free * at.advantages, bounded * at.advantages
    gain = torch.minimum(free_gain, bounded_gain)
    flows = free_gain <= bounded_gain
    if config.ratio_cap is not None:
        flows &= at.ratio <= config.ratio_cap
    if config.dual_clip is not None:
        floor = torch.where(at.advantages < 0, config.dual_clip * at.advantages, -torch.inf)
        flows &= gain >= floor
        gain = torch.maximum(gain, floor)
    return -gain, torch.where(flows, -at.advantages * at.ratio * at.inside, 0.0)


def _cispo(at: _Point, config: LossConfig) -> tuple[Tensor, Tensor]:
    coefficient = -at.ratio.clamp(max=1.0 + config.clip_high) * at.advantages
    return coefficient * at.logprobs, coefficient


def _sapo(at: _Point, config: LossConfig) -> tuple[Tensor, Tensor]:
    tau = _by_sign(at.advantages, config.sapo_tau_pos, config.sapo_tau_neg)
    gate = torch.sigmoid(tau * (at.ratio - 1.0))
    slope = 4.0 * gate * (1.0 - gate)
    return -at.advantages * gate * 4.0 / tau, -at.advantages * at.ratio * slope * at.inside


def _gamma(at: _Point, config: LossConfig) -> tuple[Tensor, Tensor]:
    assert at.log_product is not None
    k = _by_sign(at.advantages, config.gamma_pos[0], config.gamma_neg[0])
    lam = _by_sign(at.advantages, config.gamma_pos[1], config.gamma_neg[1])
    log_w = at.log_product.clamp(GAMMA_FLOOR, RATIO_LIMIT)
    coefficient = -torch.exp(lam + k * log_w - lam * log_w.exp()) * at.advantages
    return coefficient * at.logprobs, coefficient


def _reinforce(at: _Point, config: LossConfig) -> tuple[Tensor, Tensor]:
    return -at.advantages * at.logprobs, -at.advantages


_SURROGATES: dict[str, Callable[[_Point, LossConfig], tuple[Tensor, Tensor]]] = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "gamma": _gamma,
    "reinforce": _reinforce,
}
_DIFFERENTIATES_RATIO = ("clip", "sapo")


# Each row takes d = ref - logprob, the token ratio and its clamp's gradient; returns (kl, d kl / d logprob).
def _k1(d: Tensor, ratio: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    return -d, torch.ones_like(d)


def _k2(d: Tensor, ratio: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    return d * d / 2, -d


def _k3(d: Tensor, ratio: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    # exp goes on as its tangent past the limit: finite, and the gradient keeps its sign.
    capped = d.clamp(max=RATIO_LIMIT)
    growth = torch.expm1(capped)
    return growth + (growth + 1.0) * (d - capped) - d, -growth


def _k3_corrected(d: Tensor, ratio: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _k3(d, ratio, inside)
    return ratio * value, ratio * (slope + value * inside)


_KLS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "k1": _k1,
    "k2": _k2,
    "k3": _k3,
    "k3_corrected": _k3_corrected,
}


def _mismatch_weight(gap: Tensor, tokens: Tokens, config: LossConfig) -> Tensor:
    """Weight of the surrogate from gap = old - rollout, (N,)."""
    if config.mismatch == "sequence_mask":
        gap = sequence_mean(gap, tokens)
    weight = gap.clamp(-RATIO_LIMIT, RATIO_LIMIT).exp()
    if config.mismatch == "truncate":
        return weight.clamp(max=config.mismatch_high)
    kept = (weight >= config.mismatch_low) & (weight <= config.mismatch_high)
    return torch.where(kept, weight, 0.0)


def top_entropy(entropy: Tensor, counted: Tensor, share: float) -> Tensor:
    """Which tokens belong to the share of highest entropy; no synchronisation."""
    if entropy.numel() == 0:
        return counted
    ranked = torch.where(counted, entropy, -torch.inf).sort(descending=True).values
    last = (counted.sum() * share).ceil().long().clamp(min=1) - 1
    return entropy >= ranked.gather(0, last.unsqueeze(0))


def evaluate(
    config: LossConfig, tokens: Tokens, logprobs: Tensor, entropy: Tensor | None, *, measure: bool = True
) -> TokenLoss:
    """Loss, derivatives and (to measure) metrics of these tokens. Inactive tokens may hold anything."""
    require_entropy(config, entropy)
    active = tokens.active
    logprobs = torch.where(active, logprobs, 0.0)
    old = logprobs if tokens.old is None else torch.where(active, tokens.old, 0.0)
    log_ratio = logprobs - old
    token_ratio, token_inside = _clamped_exp(log_ratio)
    level, log_product = log_ratio, None
    if config.ratio_level == "sequence":
        level = sequence_mean(log_ratio, tokens)
    elif config.surrogate == "gamma":
        assert tokens.cu_seqlens is not None and tokens.sequence is not None
        log_product = sequence_sum(log_ratio, tokens.cu_seqlens)[tokens.sequence]
    ratio, inside = (token_ratio, token_inside) if level is log_ratio else _clamped_exp(level)
    at = _Point(logprobs, tokens.advantages, level, ratio, inside, log_product)
    surrogate, slope = _SURROGATES[config.surrogate](at, config)

    weights = torch.where(active, tokens.weights, 0.0)
    kept = weights
    correction = divergence = None
    if config.mismatch != "none":
        assert tokens.rollout is not None
        correction = _mismatch_weight(torch.where(active, old - tokens.rollout, 0.0), tokens, config)
        kept = kept * correction
    if config.entropy_quantile is not None:
        assert entropy is not None
        kept = torch.where(top_entropy(entropy, active, config.entropy_quantile), kept, 0.0)
    if config.off_policy_threshold is not None:
        drift = sequence_mean(-log_ratio, tokens)
        kept = torch.where((tokens.advantages < 0) & (drift > config.off_policy_threshold), 0.0, kept)

    loss, by_logprob = kept * surrogate, kept * slope
    if config.ratio_level == "sequence" and config.surrogate in _DIFFERENTIATES_RATIO:
        # every token of a sequence moves the one ratio that all of its terms share
        by_logprob = torch.where(active, sequence_mean(by_logprob, tokens), 0.0)
    if tokens.ref is not None:
        distance = torch.where(active, tokens.ref, 0.0) - logprobs
        divergence, divergence_slope = _KLS[config.kl](distance, token_ratio, token_inside)
        if config.kl_coef != 0.0:
            loss = loss + config.kl_coef * weights * divergence
            by_logprob = by_logprob + config.kl_coef * weights * divergence_slope
    by_entropy = None
    if config.entropy_coef != 0.0:
        assert entropy is not None
        by_entropy = -config.entropy_coef * weights
        loss = loss + by_entropy * torch.where(active, entropy, 0.0)
    metrics: dict[str, Tensor] = {}
    if measure:
        dropped = (kept == 0.0) & (weights != 0.0)
        means = {"kl": divergence, "entropy": entropy, "mismatch_weight": correction, "dropped_frac": dropped}
        metrics = _ratio_metrics(config, tokens, ratio, level, old)
        metrics |= {name: _mean(values, active) for name, values in means.items() if values is not None}
    return TokenLoss(loss, by_logprob, by_entropy, metrics)


def _clamped_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    inside = (log_ratio.abs() <= RATIO_LIMIT).to(log_ratio.dtype)
    return log_ratio.clamp(-RATIO_LIMIT, RATIO_LIMIT).exp(), inside


def _mean(values: Tensor, active: Tensor) -> Tensor:
    total = torch.where(active, values, 0).sum(dtype=torch.float32)
    return total / active.sum().clamp(min=1)


def _ratio_metrics(
    config: LossConfig, tokens: Tokens, ratio: Tensor, level: Tensor, old: Tensor
) -> dict[str, Tensor]:
    active, advantages = tokens.active, tokens.advantages
    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    metrics = {
        "tokens": active.sum(),
        "clip_low_frac": _mean((ratio < low) & (advantages < 0), active),
        "clip_high_frac": _mean((ratio > high) & (advantages > 0), active),
        "ratio_mean": _mean(ratio, active),
        "ratio_max": torch.where(active, ratio, 0.0).amax() if ratio.numel() else ratio.new_zeros(()),
        "clamped_frac": _mean(level.abs() > RATIO_LIMIT, active),
    }
    if tokens.rollout is not None:
        gap = torch.where(active, old - tokens.rollout, 0.0)
        bounded = gap.clamp(-RATIO_LIMIT, RATIO_LIMIT)
        metrics["mismatch_mean"] = _mean(gap.abs(), active)
        metrics["mismatch_k1"] = _mean(-gap, active)
        metrics["mismatch_k3"] = _mean(torch.expm1(bounded) - bounded, active)
        metrics["mismatch_square"] = _mean(torch.exp(2 * bounded), active)
        metrics["mismatch_max"] = gap.abs().amax() if gap.numel() else gap.new_zeros(())
    return metrics
