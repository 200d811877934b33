"""Log-probs -> policy loss of the GRPO family, with its gradient written out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._token_loss import Tokens, check_config, evaluate, prepare
from .loss_config import LossConfig


def grpo_loss(
    logprobs: Tensor,  # (N,)
    advantages: Tensor,  # (N,) or (S,)
    config: LossConfig,
    *,
    old_logprobs: Tensor | None = None,  # (N,)
    ref_logprobs: Tensor | None = None,  # (N,)
    rollout_logprobs: Tensor | None = None,  # (N,)
    loss_mask: Tensor | None = None,  # (N,)
    entropy: Tensor | None = None,  # (N,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch of packed completion tokens, from their log-probs.

    ``loss = Σ_t weight_t · token_loss_t / normalizer``: with the normalizer of the whole optimizer step, the
    losses and gradients of its micro-batches add up to those of the step, however it was split (all but
    ``entropy_quantile``, which ranks the tokens of the call).

    Args:
        logprobs: (N,) float32 or float64; carries the gradient.
        advantages: (N,) per token, or (S,) per sequence with cu_seqlens.
        config: what the loss is made of; ``LossConfig.preset("dapo")`` and others.
        old_logprobs: log-probs of the policy that is the ratio's denominator; None: the current ones,
            detached.
        ref_logprobs: log-probs of the reference policy; needed where kl_coef is not 0.
        rollout_logprobs: the engine's own log-probs; needed where mismatch is not "none".
        loss_mask: bool or integer, nonzero where a token counts; None: all do.
        entropy: per-token entropy; carries the gradient of the bonus, needed by entropy_coef and
            entropy_quantile.
        cu_seqlens: int32 or int64 boundaries of the sequences in N, from 0 to N.
        normalizer: sequence_mean: number of sequences; token_mean: number of loss tokens; constant: the
            constant, which must be given. None: of this call.

    Returns:
        The loss, 0-d, and metrics, 0-d tensors on the device without gradient: "tokens" (how many may carry
        loss) and, over those, the means kl, entropy, ratio_mean, clip_low_frac, clip_high_frac,
        clamped_frac (log ratio beyond ±20), dropped_frac (lost the surrogate by mismatch or token choice),
        mismatch_mean (|old - rollout|), mismatch_weight, and the maxima ratio_max and mismatch_max; those
        that apply.

    Raises:
        ValueError, TypeError: a missing or ill-shaped argument; the message names it.
    """
    if logprobs.ndim != 1 or logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logprobs must be float32 or float64 of shape (N,), got {logprobs.dtype} {logprobs.shape}"
        )
    if entropy is not None and entropy.shape != logprobs.shape:
        raise ValueError(f"entropy must have shape (N,) = ({logprobs.shape[0]},), got {tuple(entropy.shape)}")
    check_config(config)
    tokens = prepare(
        config,
        logprobs.shape[0],
        advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        device=logprobs.device,
        dtype=logprobs.dtype,
    )
    metrics: dict[str, Tensor] = {}
    loss = _GrpoLoss.apply(logprobs, entropy, tokens, config, metrics)
    return loss, metrics  # type: ignore[return-value]


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        tokens: Tokens,
        config: LossConfig,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        result = evaluate(config, tokens, logprobs, entropy)
        ctx.save_for_backward(result.by_logprob, result.by_entropy)
        metrics.update(result.metrics)
        return result.loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_logprob, by_entropy = ctx.saved_tensors
        d_entropy = None if by_entropy is None or not ctx.needs_input_grad[1] else by_entropy * grads[0]
        return by_logprob * grads[0], d_entropy, None, None, None
