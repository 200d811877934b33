"""hidden x head weight -> policy loss and its gradients, in one pass over token chunks."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._arguments import check_tensors
from ._backends import run_head
from ._head import (
    Head,
    HeadOutput,
    Needs,
    accumulation_dtype,
    choose_backend,
    head_arguments,
    make_head,
    on_device,
)
from ._loss_arguments import check_config
from ._operators import by_name, empty_gradients, scaled, set_gradient, shapes_of, split_normalizer
from ._token_loss import Tokens, evaluate, metric_names, prepare
from .loss_config import LossConfig


def linear_grpo_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    advantages: Tensor,  # (N,) or (S,)
    config: LossConfig,
    *,
    old_logprobs: Tensor | None = None,  # (N,)
    ref_logprobs: Tensor | None = None,  # (N,)
    rollout_logprobs: Tensor | None = None,  # (N,)
    loss_mask: Tensor | None = None,  # (N,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``grpo_loss(linear_logprob(...), ...)`` with the gradients finished in the forward pass.

    A token's coefficient needs its own log-prob and constants only, so each chunk goes product → row pass →
    coefficient → dX and dW at once: 6·N·V·H FLOPs forward and backward together, 4·N·V·H with a frozen head.
    Options that couple tokens (sequence ratios, gamma, entropy_quantile, off_policy_threshold, sequence_mask)
    take all log-probs first: 2·N·V·H more, unless the head is frozen or the call fits one chunk.
    Tokens that cannot carry a gradient (masked; advantage 0 where nothing else acts) never reach the product:
    on the CPU always; on a GPU where loss_mask or advantages are handed over as CPU tensors, since finding
    them on the device would stop the host. Their log-probs then count in no metric, on any path.

    The losses are those of ``LossConfig``: GRPO (arXiv 2402.03300), which clips as PPO does (1707.06347), DAPO
    (2503.14476), Dr. GRPO (2503.20783), GSPO (2507.18071), CISPO (2506.13585), SAPO (2511.20347), RLOO (2402.14740),
    REINFORCE++ (2501.03262) and others; a lower bound for negative advantages is from dual-clip PPO (1912.09729), the
    choice of tokens by entropy from 2506.01939. Logits are never stored, after Cut Cross-Entropy (2411.09009).

    Args: see ``grpo_loss`` for the loss's and ``linear_logprob`` for the head's. All tensors are on the device of
    hidden; advantages, loss_mask and cu_seqlens may be on the CPU, and are then copied across.

    Returns:
        The loss, 0-d, differentiable once by hidden, weight and bias, and the metrics of ``grpo_loss``.

    Raises:
        ValueError, TypeError: as those two. RuntimeError: a second backward through the same result.
    """
    check_config(config)
    hidden, weight, bias, options = head_arguments(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, backend
    )
    check_tensors(
        "hidden",
        hidden.device,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
    )
    check_tensors(
        "hidden",
        hidden.device,
        or_cpu=True,
        advantages=advantages,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
    )
    leaves = (hidden, weight, bias)
    needs = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves
    ]  # a leaf says requires_grad even under no_grad, and would be paid a gradient
    loss, measured, *_ = _forward(
        hidden,
        weight,
        targets,
        bias,
        advantages.detach(),
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        loss_mask,
        cu_seqlens,
        *split_normalizer(normalizer),
        config.key,
        *options,
        backend,
        needs,
    )
    names = _metric_names(config, ref_logprobs, rollout_logprobs)
    return loss, by_name(names, measured)


def _metric_names(config: LossConfig, ref: Tensor | None, rollout: Tensor | None) -> tuple[str, ...]:
    names = metric_names(config, ref=ref is not None, rollout=rollout is not None, entropy=True)
    return (*names, "invalid_targets")


def _rows_to_compute(
    config: LossConfig,
    tokens: Tokens,
    advantages: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """Indices of tokens that reach the product, None for all: from what the host knows without waiting."""
    active = tokens.active
    if active.device.type != "cpu":
        active = _known_active(config, active.shape[0], advantages, loss_mask, cu_seqlens)
    if bool(active.all()):
        return None
    return active.nonzero().squeeze(1).to(tokens.active.device, non_blocking=True)


def _known_active(
    config: LossConfig,
    count: int,
    advantages: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """(count,) bool on the CPU: false where what lies there says that a token counts for nothing."""
    known = torch.ones(count, dtype=torch.bool)
    if loss_mask is not None and loss_mask.device.type == "cpu":
        known &= loss_mask != 0
    by_sequence = advantages.shape != (count,)
    if advantages.device.type == "cpu" and config.skips_zero_advantage(by_sequence):
        if not by_sequence:
            known &= advantages != 0
        elif cu_seqlens is not None and cu_seqlens.device.type == "cpu":
            known &= (advantages != 0).repeat_interleave(cu_seqlens.diff())
    return known


@torch.library.custom_op("grpo_kernels::linear_grpo_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    config_key: str,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics (in the order of their names) and the gradients of hidden, weight and bias."""
    config = LossConfig.from_key(config_key)
    if loss_mask is not None and loss_mask.shape == targets.shape:  # a masked token may hold anything
        targets = targets.where(loss_mask.to(targets.device, non_blocking=True) != 0, 0)
    head = make_head(hidden, weight, targets, bias, temperature, softcap, logit_scale)
    tokens = prepare(
        config,
        hidden.shape[0],
        advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer_number if normalizer is None else normalizer,
        device=hidden.device,
        dtype=head.accumulate,
    )
    chosen = _rows_to_compute(config, tokens, advantages, loss_mask, cu_seqlens)
    if chosen is not None:
        head = replace(head, hidden=hidden[chosen], targets=head.targets[chosen])
    metrics: dict[str, Tensor] = {}
    wanted = Needs(*needs, entropy=config.entropy_coef != 0.0)
    with on_device(hidden.device):
        output, loss = _one_pass(head, wanted, tokens, config, chosen, backend, metrics)
    metrics["invalid_targets"] = ((targets < 0) | (targets >= weight.shape[0])).sum()
    names = _metric_names(config, ref_logprobs, rollout_logprobs)
    measured = torch.stack([metrics[name].to(head.accumulate) for name in names])
    d_hidden = output.hidden
    if d_hidden is not None and chosen is not None:
        d_hidden = torch.zeros_like(hidden).index_copy_(0, chosen, d_hidden)
    nothing = hidden.new_empty
    gradients = (nothing(0) if g is None else g for g in (d_hidden, output.weight, output.bias))
    return (loss, measured, *gradients)  # type: ignore[return-value]


@shapes_of(_forward)
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    config_key: str,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    names = _metric_names(LossConfig.from_key(config_key), ref_logprobs, rollout_logprobs)
    dtype = accumulation_dtype(hidden.dtype)
    loss, measured = hidden.new_empty((), dtype=dtype), hidden.new_empty(len(names), dtype=dtype)
    return (loss, measured, *empty_gradients(hidden, weight, bias, needs))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.needs = inputs[-1]


def _differentiate(ctx: Any, by_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if getattr(ctx, "done", False):
        raise RuntimeError("linear_grpo_loss gives its gradients once; call it again instead of retain_graph")
    ctx.done = True
    d_hidden, d_weight, d_bias = (
        scaled(gradient, by_loss) if need else None
        for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return (d_hidden, d_weight, None, d_bias, *(None,) * 14)


set_gradient(_forward, _differentiate, save=_save)


def _one_pass(
    head: Head,
    needs: Needs,
    tokens: Tokens,
    config: LossConfig,
    chosen: Tensor | None,
    backend: str,
    metrics: dict[str, Tensor],
) -> tuple[HeadOutput, Tensor]:
    """The head's pass with this loss's coefficients; fills metrics and returns the loss."""
    backend = choose_backend(backend, head.hidden.device, head.hidden.dtype)
    measure = evaluate
    if backend != "torch":
        from ._triton_loss import evaluate as measure  # imports triton, which only these backends need

    count = tokens.active.shape[0]
    part = tokens if chosen is None else tokens.rows(chosen)

    def spread(values: Tensor) -> Tensor:
        """Values of the chosen rows at their places among all tokens."""
        return values if chosen is None else values.new_zeros(count).index_copy_(0, chosen, values)

    def finish(output: HeadOutput) -> tuple[Tensor, Tensor | None, Tensor]:
        result = measure(config, tokens, spread(output.logprobs), spread(output.entropy))
        metrics.update(result.metrics)
        by_logprob, by_entropy = result.by_logprob, result.by_entropy
        if chosen is not None:
            by_logprob = by_logprob[chosen]
            by_entropy = None if by_entropy is None else by_entropy[chosen]
        return by_logprob, by_entropy, result.loss.sum()

    if not (needs.hidden or needs.weight or needs.bias):
        output = run_head(head, Needs(), None, backend)
        return output, finish(output)[-1]

    if not config.couples_tokens:

        def own(rows: slice, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
            result = measure(config, part.rows(rows), logprobs, entropy, measure=False)
            return result.by_logprob, result.by_entropy

        output = run_head(head, needs, own, backend)
        return output, finish(output)[-1]

    if not (needs.weight or needs.bias or needs.entropy):
        output = run_head(head, needs, lambda rows, logprobs, _: (logprobs.new_ones(1), None), backend)
        by_logprob, _, loss = finish(output)
        assert output.hidden is not None
        output.hidden.mul_(by_logprob.unsqueeze(1))
        return output, loss

    found: list[tuple[Tensor, Tensor | None, Tensor]] = []

    def coupled(rows: slice, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        if not found:
            whole = logprobs.shape[0] == head.hidden.shape[0]
            first = (
                HeadOutput(logprobs, entropy, None, None, None)
                if whole
                else run_head(head, Needs(), None, backend)
            )
            found.append(finish(first))
        by_logprob, by_entropy, _ = found[0]
        return by_logprob[rows], None if by_entropy is None else by_entropy[rows]

    output = run_head(head, needs, coupled, backend)
    return output, found[0][2] if found else finish(output)[-1]
