"""Log-probs -> policy loss of the GRPO family, with its gradient written out."""

from typing import Any

import torch
from torch import Tensor

from ._arguments import check_real, check_tensors
from ._head import ELEMENTWISE_BACKENDS, check_backend, choose_backend, on_device
from ._loss_arguments import check, check_config
from ._operators import by_name, set_gradient, shapes_of, split_normalizer
from ._token_loss import evaluate, metric_names, per_token_form
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
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch of packed completion tokens, from their log-probs.

    ``loss = Σ_t weight_t · token_loss_t / normalizer``: with the normalizer of the whole optimizer step, the
    losses and gradients of its micro-batches add up to those of the step, however it was split (all but
    ``entropy_quantile``, which ranks the tokens of the call). The token losses are those of GRPO (arXiv 2402.03300),
    DAPO (2503.14476) and the others that ``LossConfig`` names; the gradient is written out, not traced.

    Args:
        logprobs: (N,) float32 or float64; carries the gradient.
        advantages: (N,) per token, or (S,) per sequence with cu_seqlens, floating point or integer. Where S = N and
            sequences are empty, which of the two is meant cannot be told, and is refused on the CPU; on a GPU, which
            is not asked, it is taken per token, unless the environment says ``GRPO_KERNELS_DEBUG=1``.
        config: what the loss is made of; ``LossConfig.preset("dapo")`` and others.
        old_logprobs: log-probs of the policy that is the ratio's denominator; None: the current ones,
            detached.
        ref_logprobs: log-probs of the reference policy; needed where kl_coef is not 0.
        rollout_logprobs: the engine's own log-probs; needed where mismatch is not "none".
        loss_mask: bool or integer, nonzero where a token counts; None: all do.
        entropy: per-token entropy; carries the gradient of the bonus, needed by entropy_coef and
            entropy_quantile.
        cu_seqlens: int32 or int64 boundaries of the sequences in N, from 0 to N. Checked on the CPU, and elsewhere
            with ``GRPO_KERNELS_DEBUG=1``.
        normalizer: sequence_mean: number of sequences; token_mean: number of loss tokens; constant: the
            constant, which must be given. None: of this call. A number, or a 0-d tensor on any device.
        backend: "torch" (some 60 small operations), "triton" (float32: one kernel and the sum of its parts), or
            "auto": triton on CUDA where it is installed.

    Returns:
        The loss, 0-d, and metrics, 0-d tensors on the device without gradient, in the dtype of logprobs: "tokens"
        (how many may carry loss; in float32 exact up to 2^24) and, over those, the means kl, entropy, ratio_mean,
        clip_low_frac, clip_high_frac, clamped_frac (log ratio beyond ±20), dropped_frac (lost the surrogate by
        mismatch or token choice), mismatch_weight, of the gap d = old - rollout mismatch_mean (|d|), the estimators
        mismatch_k1 (-d) and mismatch_k3 (e^d - 1 - d) of KL(rollout, old) and mismatch_square (e^2d: with
        w = 1 + k3 - k1 the mean weight, w² / square is the effective share of the sample), and the maxima ratio_max
        and mismatch_max; those that apply.

    Raises:
        ValueError, TypeError: an argument that is missing, or of a wrong shape, dtype, range or device (all tensors
        are on that of logprobs); the message names it.
    """
    if logprobs.ndim != 1 or logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logprobs must be float32 or float64 of shape (N,), got {logprobs.dtype} {logprobs.shape}"
        )
    check_tensors(
        "logprobs",
        logprobs.device,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        loss_mask=loss_mask,
        entropy=entropy,
        cu_seqlens=cu_seqlens,
    )
    if entropy is not None and entropy.shape != logprobs.shape:
        raise ValueError(f"entropy must have shape (N,) = ({logprobs.shape[0]},), got {tuple(entropy.shape)}")
    if entropy is not None:
        check_real("entropy", entropy)
    check_config(config)
    check_backend(backend, ELEMENTWISE_BACKENDS)
    loss, measured, *_ = _forward(
        logprobs,
        entropy,
        advantages.detach(),
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        loss_mask,
        cu_seqlens,
        *split_normalizer(normalizer),
        config.key,
        backend,
    )
    names = _metric_names(config, entropy, ref_logprobs, rollout_logprobs)
    return loss, by_name(names, measured)


def _metric_names(
    config: LossConfig, entropy: Tensor | None, ref: Tensor | None, rollout: Tensor | None
) -> tuple[str, ...]:
    return metric_names(config, ref=ref is not None, rollout=rollout is not None, entropy=entropy is not None)


@torch.library.custom_op("grpo_kernels::grpo_loss", mutates_args=())
def _forward(
    logprobs: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    config_key: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics (in the order of their names), and its derivatives by log-probs and entropies."""
    config = LossConfig.from_key(config_key)
    arguments = check(
        config,
        logprobs.shape[0],
        advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer_number if normalizer is None else normalizer,
        device=logprobs.device,
        dtype=logprobs.dtype,
    )
    if choose_backend(backend, logprobs.device, logprobs.dtype) == "triton":
        from ._triton_loss import evaluate_whole  # imports triton, which only this backend needs

        with on_device(logprobs.device):
            result = evaluate_whole(config, arguments, logprobs, entropy)
        loss = result.loss.clone()  # one of the numbers measured
    else:
        tokens = per_token_form(config, logprobs.shape[0], arguments)
        result = evaluate(config, tokens, logprobs, entropy)
        loss = result.loss.sum()
    names = _metric_names(config, entropy, ref_logprobs, rollout_logprobs)
    measured = torch.stack([result.metrics[name].to(logprobs.dtype) for name in names])
    by_entropy = logprobs.new_empty(0) if result.by_entropy is None else result.by_entropy
    return loss, measured, result.by_logprob, by_entropy


@shapes_of(_forward)
def _(
    logprobs: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    config_key: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config = LossConfig.from_key(config_key)
    names = _metric_names(config, entropy, ref_logprobs, rollout_logprobs)
    per_token = logprobs.new_empty(logprobs.shape)
    by_entropy = torch.empty_like(per_token) if config.entropy_coef != 0.0 else logprobs.new_empty(0)
    return logprobs.new_empty(()), logprobs.new_empty(len(names)), per_token, by_entropy


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])


def _differentiate(ctx: Any, by_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    by_logprob, by_entropy = (part.detach() for part in ctx.saved_tensors)
    carried = by_entropy.numel() == by_logprob.numel() and ctx.needs_input_grad[1]
    return (by_logprob * by_loss, by_entropy * by_loss if carried else None, *(None,) * 10)


set_gradient(_forward, _differentiate, save=_save)
