"""Plain PyTorch of every operation, through autograd: the specification, the test oracle, the baseline.

Same names and arguments as the public functions (``backend`` is taken and ignored). Gives float64 results for
float64 inputs. Allocates whatever it likes, loops where a loop is clearest.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._listed import floats, integers
from .loss_config import LossConfig


def linear_logprob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Logits, log-softmax, gather; entropy of the same distribution. (N,) each, at least float32."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits * (logit_scale / temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    every = torch.log_softmax(logits, dim=-1)
    surprise = torch.where(every == -torch.inf, 0.0, every)
    entropy = -(surprise.exp() * surprise).masked_fill(every == -torch.inf, 0.0).sum(-1)
    return every.gather(1, targets.long().unsqueeze(1)).squeeze(1), entropy


def grpo_loss(
    logprobs: Tensor,  # (N,)
    advantages: Tensor,  # (N,) or (S,)
    config: LossConfig,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    loss_mask: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, sequence by sequence. Metrics: tokens, and the means kl and ratio_mean over them."""
    count = logprobs.shape[0]
    bounds = [0, count] if cu_seqlens is None else integers(cu_seqlens)
    mask = torch.ones(count, dtype=torch.bool) if loss_mask is None else loss_mask.cpu().bool()
    if advantages.shape != (count,):
        advantages = torch.cat(
            [advantages[i].expand(bounds[i + 1] - bounds[i]) for i in range(len(bounds) - 1)]
        )
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    share = torch.ones(count, dtype=torch.bool)
    if config.entropy_quantile is not None:
        assert entropy is not None
        ranked = entropy.detach()[mask].sort(descending=True).values
        share = entropy.detach().cpu() >= ranked[math.ceil(config.entropy_quantile * len(ranked)) - 1].cpu()

    total = logprobs.new_zeros(())
    kls: list[Tensor] = []
    ratios: list[Tensor] = []
    for first, last in itertools.pairwise(bounds):
        here = torch.arange(first, last)[mask[first:last]].to(logprobs.device)
        if len(here) == 0:
            continue
        lp, advantage, log_ratio = logprobs[here], advantages[here], logprobs[here] - old[here]
        level = log_ratio.mean().expand_as(lp) if config.ratio_level == "sequence" else log_ratio
        term = _surrogate(config, lp, advantage, level, log_ratio) * share[here.cpu()].to(lp.device)
        if config.mismatch != "none":
            assert rollout_logprobs is not None
            term = term * _mismatch(config, (old[here] - rollout_logprobs[here]).detach())
        if (
            config.off_policy_threshold is not None
            and -log_ratio.detach().mean() > config.off_policy_threshold
        ):
            term = torch.where(advantage < 0, 0.0, term)
        ratios.append(level.detach().clamp(-20, 20).exp())
        if ref_logprobs is not None:
            kl = _divergence(config, lp, ref_logprobs[here], log_ratio)
            term = term + config.kl_coef * kl
            kls.append(kl.detach())
        if config.entropy_coef != 0.0:
            assert entropy is not None
            term = term - config.entropy_coef * entropy[here]
        total = total + (term.mean() if config.aggregation == "sequence_mean" else term.sum())
    if normalizer is None:
        if config.aggregation == "constant":
            raise ValueError("aggregation='constant' needs a normalizer")
        normalizer = float(
            len(bounds) - 1 if config.aggregation == "sequence_mean" else max(1, int(mask.sum()))
        )
    metrics = {"tokens": mask.sum()}
    metrics |= {name: torch.cat(v).mean() for name, v in (("kl", kls), ("ratio_mean", ratios)) if v}
    return total / normalizer, metrics


def _surrogate(config: LossConfig, lp: Tensor, advantage: Tensor, level: Tensor, log_ratio: Tensor) -> Tensor:
    ratio = level.clamp(-20, 20).exp()
    high = 1 + config.clip_high
    if config.surrogate == "clip":
        free = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
        gain = torch.minimum(free * advantage, ratio.clamp(1 - config.clip_low, high) * advantage)
        if config.dual_clip is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, config.dual_clip * advantage), gain)
        return -gain
    if config.surrogate == "cispo":
        return -ratio.detach().clamp(max=high) * advantage * lp
    if config.surrogate == "sapo":
        tau = torch.where(advantage >= 0, lp.new_full((), config.sapo_tau_pos), config.sapo_tau_neg)
        return -advantage * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    if config.surrogate == "gamma":
        w = log_ratio.detach().sum().clamp(math.log(1e-8), 20).exp()
        weight: list[Tensor] = []
        for a in floats(advantage):
            k, lam = config.gamma_pos if a >= 0 else config.gamma_neg
            weight.append(torch.exp(lam - lam * w) * w**k)
        return -torch.stack(weight) * advantage * lp
    return -advantage * lp


def _divergence(config: LossConfig, lp: Tensor, ref: Tensor, log_ratio: Tensor) -> Tensor:
    d = ref - lp
    if config.kl == "k1":
        return -d
    if config.kl == "k2":
        return d * d / 2
    capped = d.clamp(max=20)  # beyond, exp goes on as its tangent
    k3 = torch.expm1(capped) + capped.exp().detach() * (d - capped) - d
    k3 = torch.where(d > 20, k3, torch.expm1(capped) - d)
    return k3 if config.kl == "k3" else log_ratio.clamp(-20, 20).exp() * k3


def _mismatch(config: LossConfig, gap: Tensor) -> Tensor:
    if config.mismatch == "sequence_mask":
        gap = gap.mean().expand_as(gap)
    weight = gap.clamp(-20, 20).exp()
    if config.mismatch == "truncate":
        return weight.clamp(max=config.mismatch_high)
    return torch.where((weight < config.mismatch_low) | (weight > config.mismatch_high), 0.0, weight)


def linear_grpo_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    advantages: Tensor,  # (N,) or (S,)
    config: LossConfig,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The two above, one after the other."""
    logprobs, entropy = linear_logprob(
        hidden, weight, targets, temperature=temperature, bias=bias, softcap=softcap, logit_scale=logit_scale
    )
    return grpo_loss(
        logprobs,
        advantages,
        config,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        loss_mask=loss_mask,
        entropy=entropy,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
    )


def group_advantages(
    rewards: Tensor,  # (S, R) or (S,)
    *,
    group_size: int = 8,
    group_sizes: Tensor | Sequence[int] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    mode: str = "gdpo",
    scale: str | None = None,
    std_floor: float = 0.0,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Group by group, head by head."""
    rows = rewards.double().unsqueeze(1) if rewards.ndim == 1 else rewards.double()
    count, heads = rows.shape
    w = [1.0] * heads if weights is None else floats(torch.as_tensor(weights).double())
    sizes = [group_size] * (count // group_size) if group_sizes is None else list(map(int, group_sizes))
    scale = scale or ("none" if mode == "leave_one_out" else "group")
    groups = list(torch.split(rows, sizes))
    if mode in ("scalarized", "leave_one_out"):
        groups = [_weighted_sum(group, w).unsqueeze(1) for group in groups]
        w = [1.0]
    batch = [_deviation(torch.cat([group[:, k] for group in groups])) for k in range(len(w))]
    pieces: list[Tensor] = []
    for group in groups:
        piece = torch.zeros(len(group), dtype=torch.float64)
        deviation = [_deviation(group[:, k]) for k in range(len(w))]
        for k, head in enumerate(group.unbind(1)):
            seen = head[~head.isnan()]
            if len(seen) < 2 or deviation[k] <= max(std_floor, 1e-7 * float(seen.abs().max())):
                continue
            divisor = {"group": deviation[k] + eps, "batch": batch[k] + eps, "none": 1.0}[scale]
            if mode == "dvao":
                parts = deviation if scale == "group" else batch
                divisor = sum(abs(w[j]) * parts[j] for j in range(len(w))) + eps
            off = head - seen.mean()
            if mode == "leave_one_out":
                off = off * len(seen) / (len(seen) - 1)
            piece += w[k] * off.nan_to_num() / divisor
        pieces.append(piece)
    result = torch.cat(pieces)
    if mode == "gdpo" and count > 1:
        result = (result / (result.std() + eps)).nan_to_num()  # 0/0 where eps is 0 and every group is flat
    return result.float()


def _weighted_sum(group: Tensor, w: list[float]) -> Tensor:
    """Σ w_k r_k with missing values at the group's mean; NaN where a sequence has no value at all."""
    total = torch.zeros(len(group), dtype=torch.float64)
    for k, head in enumerate(group.unbind(1)):
        total += w[k] * torch.where(head.isnan(), head.nanmean(), head).nan_to_num()
    return torch.where(group.isnan().all(1), torch.nan, total)


def _deviation(values: Tensor) -> float:
    seen = values[~values.isnan()]
    return float(seen.std()) if len(seen) > 1 else 0.0
