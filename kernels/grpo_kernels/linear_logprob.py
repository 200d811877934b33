"""hidden x head weight -> log-prob and entropy of each target, without logits in memory."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._backends import run_head
from ._head import Needs, accumulation_dtype, head_arguments, make_head
from ._operators import empty_gradients, set_gradient, shapes_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    vocab_group: "ProcessGroup | None" = None,
    vocab_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and entropy of its distribution, from hidden states.

    ``z = logit_scale · cap(hidden weightᵀ + bias) / temperature`` with ``cap(x) = softcap · tanh(x /
    softcap)`` where softcap is set; ``logprobs = log_softmax(z)[targets]``. Both results are differentiable
    by hidden, weight and bias. Nothing of size N×V is allocated: tokens pass in chunks of bounded scratch.

    A head that needs no gradient costs 4·N·V·H FLOPs for forward and backward together (the derivative by
    hidden is finished in the forward pass); a trained head 8·N·V·H. Where the loss is one of ``LossConfig``,
    ``linear_grpo_loss`` needs 6. That logits need not be stored is from Cut Cross-Entropy (arXiv 2411.09009); taking
    the target's logit as the reference of the exponentials, and what follows from it, is in the README.

    Args:
        hidden: (N, H) float32, bfloat16 or float16 (float64 on the torch backend).
        weight: (V, H) of the same dtype and device.
        targets: (N,) int32 or int64 in [0, V). Out of range raises on the CPU; on a GPU, where looking would stop
            the host, the log-prob is NaN, unless the environment says ``GRPO_KERNELS_DEBUG=1``.
        temperature: positive; a number, as are the next two: a tensor's gradient would be lost.
        softcap: positive, or None for no cap.
        logit_scale: finite.
        bias: (V,) floating point; -inf entries mask tokens that are never targets.
        backend: "torch", "triton", "fused", or "auto": triton on CUDA, torch elsewhere.
        vocab_group: the vocabulary is shared out over this process group: weight (and bias) hold this rank's rows,
            hidden and targets are the same on every rank. The gradient of hidden comes back summed over the group.
            PyTorch between the products, whatever the device; not inside ``torch.compile``.
        vocab_start: with vocab_group, the token that this rank's first row stands for.

    Returns:
        logprobs and entropy, (N,) each, float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range; the message names it.
    """
    hidden, weight, bias, options = head_arguments(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, backend
    )
    if vocab_group is None and vocab_start:
        raise ValueError(f"vocab_start = {vocab_start} needs vocab_group")
    if vocab_group is not None:
        if backend not in ("auto", "torch"):
            raise ValueError(f"backend must be auto or torch with vocab_group, got {backend!r}")
        from ._vocab_parallel import vocab_parallel_logprob

        with torch.autocast(hidden.device.type, enabled=False):
            return vocab_parallel_logprob(hidden, weight, targets, bias, options, vocab_group, vocab_start)
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not trained
    logprobs, entropy, _ = _forward(hidden, weight, targets, bias, *options, backend, frozen)
    return logprobs, entropy


@torch.library.custom_op("grpo_kernels::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy, and for a frozen head ∂logprob/∂hidden (N, H): it has no unknown factor."""
    head = make_head(hidden, weight, targets, bias, temperature, softcap, logit_scale)
    if not frozen:
        output = run_head(head, Needs(), None, backend)
        return output.logprobs, output.entropy, hidden.new_empty(0)
    output = run_head(
        head, Needs(hidden=True), lambda rows, logprobs, _: (logprobs.new_ones(1), None), backend
    )
    assert output.hidden is not None
    return output.logprobs, output.entropy, output.hidden


@shapes_of(_forward)
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    return (
        logprobs,
        torch.empty_like(logprobs),
        hidden.new_empty(hidden.shape) if frozen else hidden.new_empty(0),
    )


@torch.library.custom_op("grpo_kernels::linear_logprob_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; an empty tensor where one is not needed."""
    head = make_head(hidden, weight, targets, bias, temperature, softcap, logit_scale)

    def coefficients(rows: slice, logprobs: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None]:
        direct = torch.zeros_like(logprobs) if by_logprob is None else by_logprob[rows]
        return direct, None if by_entropy is None else by_entropy[rows]

    output = run_head(head, Needs(*needs, entropy=by_entropy is not None), coefficients, backend)
    return tuple(  # type: ignore[return-value]
        hidden.new_empty(0) if gradient is None else gradient
        for gradient in (output.hidden, output.weight, output.bias)
    )


@shapes_of(_backward)
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, *options, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, output[2])
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, unit_gradient = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    none = (None,) * 5
    if by_logprob is None and by_entropy is None:
        return (None, None, None, None, *none)
    if unit_gradient.numel() and by_entropy is None:
        assert by_logprob is not None
        return ((unit_gradient * by_logprob.unsqueeze(1)).to(hidden.dtype), None, None, None, *none)
    gradients = _backward(hidden, weight, targets, bias, by_logprob, by_entropy, *ctx.options, wanted)
    d_hidden, d_weight, d_bias = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    return (d_hidden, d_weight, None, d_bias, *none)


set_gradient(_forward, _differentiate, save=_save)
