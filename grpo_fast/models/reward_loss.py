"""What a reward model is trained on: the loss of each head's kind, on the labels that are there.

Every loss is a sum over labels (or comparisons) divided by their number in the whole optimizer step, so the losses of
micro-batches add up however the step is split and packed. Dimension letters: S replies, M comparisons, R heads, K
members of the ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fast.config.reward_settings import RewardLossSettings
from grpo_fast.models.reward_data import LOG_VARIANCE_LIMIT, Layout


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is known about S replies, and how much there is of it in the whole optimizer step."""

    labels: Tensor
    """(S, R) float32 in the labels' unit, NaN where one is missing"""
    weights: Tensor
    """(S, K) float32: how often each member of an ensemble sees the reply's labels; 1 without an ensemble"""
    comparisons: Tensor
    """(M, 3) int64: head, better and worse reply"""
    margins: Tensor
    """(M,) float32: log-odds by which the better one should lead at least"""
    total: Tensor
    """(K, R) float32: weights of the observed labels, or of the comparisons, in the whole step"""

    @classmethod
    def of_step(cls, labels: Tensor, weights: Tensor, comparisons: Tensor, margins: Tensor) -> Targets:
        """The targets of a whole step."""
        observed = (~labels.isnan()).float()  # (S, R)
        heads = F.one_hot(comparisons[:, 0], labels.shape[1]).float()  # (M, R)
        total = weights.T @ observed + weights[comparisons[:, 1]].T @ heads
        return cls(labels=labels, weights=weights, comparisons=comparisons, margins=margins, total=total)

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on `device`."""
        return Targets(**{name: value.to(device) for name, value in vars(self).items()})

    def of_batch(self, rows: Tensor) -> Targets:
        """The part of a micro-batch that holds the replies `rows` (s,); a comparison goes with its better reply."""
        place = rows.new_full((len(self.labels),), -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        head, better, worse = self.comparisons.unbind(1)
        here = place[better] >= 0
        assert bool((place[worse][here] >= 0).all()), (
            "a comparison's two replies are in different micro-batches"
        )
        return Targets(
            labels=self.labels[rows],
            weights=self.weights[rows],
            comparisons=torch.stack([head, place[better], place[worse]], dim=1)[here],
            margins=self.margins[here],
            total=self.total,
        )


def head_losses(
    members: Tensor,  # (S, K, R)
    log_variance: Tensor,  # (S, len(layout.noisy))
    cuts: Sequence[Tensor],  # of each ordinal head (levels - 1,)
    targets: Targets,
    layout: Layout,
    settings: RewardLossSettings,
) -> Tensor:
    """Each member's loss on each head: (K, R), this batch's share of the step's mean.

    Regression: squared error, Huber's, or the negative log-likelihood of a Gaussian of predicted variance (Nix and
    Weigend, 1994), all in units of the labels' standard deviation. Binary: cross entropy. Ordinal: the mean cross
    entropy of "above level k" over the levels (CORAL, arXiv 1901.07884). Pairwise: Bradley-Terry with a margin (as in
    Llama 2, arXiv 2307.09288), and `center_coef` times the squared sum of the two scores (arXiv 2312.09244).
    """
    labels, heads = targets.labels[:, None], layout.heads  # (S, 1, R)
    observed = ~labels.isnan()
    mean, std = (labels.new_tensor([getattr(h, name) for h in heads]) for name in ("mean", "std"))
    # NaN is replaced before the loss: 0 * NaN would still be NaN in the gradient.
    known = torch.where(observed, labels, mean)
    goal = ((known - mean) / std).expand_as(members)
    if settings.regression == "huber":
        loss = F.huber_loss(members, goal, reduction="none", delta=settings.huber_delta)
    else:
        loss = (members - goal).square()
    if settings.regression == "gaussian" and layout.noisy:
        spread = log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)[:, None]  # (S, 1, noisy)
        noisy = torch.tensor(layout.noisy, device=labels.device)
        likelihood = 0.5 * (loss.index_select(2, noisy) * torch.exp(-spread) + spread)
        loss = loss.index_copy(2, noisy, likelihood)
    columns = list(loss.unbind(2))  # of (S, K)
    for r in layout.of_kind("binary"):
        goal = known[:, :, r].expand_as(columns[r])
        columns[r] = F.binary_cross_entropy_with_logits(members[:, :, r], goal, reduction="none")
    for cut, r in zip(cuts, layout.of_kind("ordinal"), strict=True):
        step = heads[r].low + torch.arange(len(cut), device=labels.device)
        above = (known[:, :, r, None] > step).float().expand(*columns[r].shape, -1)
        logits = members[:, :, r, None] - cut
        columns[r] = F.binary_cross_entropy_with_logits(logits, above, reduction="none").mean(dim=2)
    summed = (torch.stack(columns, dim=2) * observed * targets.weights[:, :, None]).sum(dim=0)  # (K, R)
    if len(targets.comparisons):
        summed = summed + _comparison_losses(members, targets, settings.center_coef)
    return summed / targets.total.clamp_min(1.0)


def _comparison_losses(members: Tensor, targets: Targets, center_coef: float) -> Tensor:
    """Summed Bradley-Terry losses (K, R)."""
    head, better, worse = targets.comparisons.unbind(1)
    index = head[:, None, None].expand(-1, members.shape[1], 1)
    chosen = members[better].gather(2, index)[:, :, 0]  # (M, K)
    rejected = members[worse].gather(2, index)[:, :, 0]
    loss = F.softplus(rejected - chosen + targets.margins[:, None])
    loss = loss + center_coef * (chosen + rejected).square()
    return (loss * targets.weights[better]).T @ F.one_hot(head, members.shape[2]).float()


def weighted(losses: Tensor, targets: Targets, weights: Tensor, log_noise: Tensor | None) -> Tensor:
    """One number from `head_losses` (K, R): the mean over members and heads, `weights` (R,) by head.

    With `log_noise` (R,), the logarithm of each head's noise variance, which is learned: half of loss / variance +
    log variance (Kendall et al., arXiv 1705.07115).
    """
    if log_noise is not None:
        observed = (~targets.labels.isnan()).float()
        heads = F.one_hot(targets.comparisons[:, 0], losses.shape[1]).float()
        there = targets.weights.T @ observed + targets.weights[targets.comparisons[:, 1]].T @ heads
        share = there / targets.total.clamp_min(1.0)  # adds up to 1 over the step's micro-batches
        losses = 0.5 * (losses * torch.exp(-log_noise) + share * log_noise)
    return (losses * weights).mean()
