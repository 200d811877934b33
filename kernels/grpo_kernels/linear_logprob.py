"""hidden x head weight -> log-prob and entropy of each target, without logits in memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._head import Head, Needs, make_head, run_head


def linear_logprob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and entropy of its distribution, from hidden states.

    ``z = logit_scale · cap(hidden weightᵀ + bias) / temperature`` with ``cap(x) = softcap · tanh(x /
    softcap)`` where softcap is set; ``logprobs = log_softmax(z)[targets]``. Both results are differentiable
    by hidden, weight and bias. Nothing of size N×V is allocated: tokens pass in chunks of bounded scratch.

    A head that needs no gradient costs 4·N·V·H FLOPs for forward and backward together (the derivative by
    hidden is finished in the forward pass); a trained head 8·N·V·H. Where the loss is one of ``LossConfig``,
    ``linear_grpo_loss`` needs 6.

    Args:
        hidden: (N, H) float32, bfloat16 or float16 (float64 on the torch backend).
        weight: (V, H) of the same dtype and device.
        targets: (N,) int32 or int64 in [0, V). Checked on the CPU; on a GPU out of range is undefined.
        temperature: positive.
        bias: (V,); -inf entries mask tokens that are never targets.
        backend: "torch", "triton", or "auto": triton on CUDA, torch elsewhere.

    Returns:
        logprobs and entropy, (N,) each, float32 (float64 for float64 inputs), entropy in nats.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range; the message names it.
    """
    head = make_head(
        hidden, weight, targets, temperature=temperature, bias=bias, softcap=softcap, logit_scale=logit_scale
    )
    if not torch.is_grad_enabled():  # a leaf says requires_grad even then, and would be paid a gradient
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _LinearLogprob.apply(hidden, weight, bias, head, backend)  # type: ignore[return-value]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, backend: str
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = Head(hidden, weight, head.targets, bias, head.temperature, head.softcap, head.logit_scale)
        frozen = needs_hidden and not (needs_weight or needs_bias)
        if frozen:
            # d logprob / d hidden has no unknown factor but one number a row: finish it while E is at hand.
            output = run_head(
                head, Needs(hidden=True), lambda rows, logprobs, _: (logprobs.new_ones(1), None), backend
            )
        else:
            output = run_head(head, Needs(), None, backend)
        ctx.save_for_backward(hidden, weight, bias, head.targets, output.hidden)
        ctx.options = (head.temperature, head.softcap, head.logit_scale, backend)
        ctx.set_materialize_grads(False)
        return output.logprobs, output.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_logprob, by_entropy = grads
        hidden, weight, bias, targets, unit_grad = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if by_logprob is None and by_entropy is None:
            return None, None, None, None, None
        if unit_grad is not None and by_entropy is None:
            assert by_logprob is not None
            return (unit_grad * by_logprob.unsqueeze(1)).to(hidden.dtype), None, None, None, None
        temperature, softcap, logit_scale, backend = ctx.options
        head = Head(hidden, weight, targets, bias, temperature, softcap, logit_scale)

        def coefficients(rows: slice, logprobs: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None]:
            direct = torch.zeros_like(logprobs) if by_logprob is None else by_logprob[rows]
            return direct, None if by_entropy is None else by_entropy[rows]

        needs = Needs(
            hidden=needs_hidden, weight=needs_weight, bias=needs_bias, entropy=by_entropy is not None
        )
        output = run_head(head, needs, coefficients, backend)
        return output.hidden, output.weight, output.bias, None, None
