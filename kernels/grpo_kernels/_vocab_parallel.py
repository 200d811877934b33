"""``linear_logprob`` with the head's rows, the vocabulary, shared out over a process group.

Every rank has the same hidden states and targets, and its own rows of the weight. Two collectives over N numbers
a rank, none over a maximum: the target's logit (a sum, to which its owner alone contributes), then what each
rank's other tokens weigh against it (a gather of two numbers a token). One more in the backward pass adds up dX.

With z_y the target's exponent and e_j = z_j − z_y, rank r gives ``weight_r = log Σ_{j≠y} exp(e_j)`` and the mean
of e_j under those exponentials; ``log s = logsumexp_r(weight_r)``, logprob = −log1p(s). Products run in the head's
dtype with float32 sums, everything between them in float32, by PyTorch on any device; the logits of one chunk exist.

N tokens, n of a chunk, H hidden size, V_r vocabulary rows of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._head import Head, chunk_rows, make_head

_gather_into: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
LOGITS_BYTES = 256 << 20  # of one chunk, a few times over


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,  # (V_r, H)
    targets: Tensor,  # (N,) in the whole vocabulary
    bias: Tensor | None,  # (V_r,)
    options: tuple[float, float | None, float],  # temperature, softcap, logit_scale
    group: dist.ProcessGroup,
    start: int,
) -> tuple[Tensor, Tensor]:
    """logprobs and entropy (N,) of the whole distribution, the same on every rank; differentiable once.

    The gradient of hidden is whole on every rank; those of weight and bias are of this rank's rows. A target that no
    rank has is a ValueError on the CPU, NaN on a GPU.
    """
    return _VocabParallel.apply(hidden, weight, bias, targets, options, group, start)  # type: ignore[return-value]


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[float, float | None, float],
        group: dist.ProcessGroup,
        start: int,
    ) -> tuple[Tensor, Tensor]:
        local = targets.long() - start
        owned = (local >= 0) & (local < weight.shape[0])
        head = make_head(hidden, weight, local.where(owned, 0), bias, *options)
        own = _own_exponents(head)
        shares = torch.stack([own.where(owned, 0.0), owned.to(own.dtype)])  # (2, N)
        dist.all_reduce(shares, group=group)
        known = shares[1] == 1.0
        if own.device.type == "cpu" and not bool(known.all()):
            place = int((~known).nonzero()[0])
            raise ValueError(
                f"targets must each lie in one rank's rows of the vocabulary, targets[{place}] = {int(targets[place])} "
                f"lies in {int(shares[1, place])}; look at vocab_start (here {start}, {len(weight)} rows)"
            )
        own = shares[0].where(known, torch.nan)

        here = own.new_empty(2, len(own))  # log of the others' sum; their mean exponent
        for rows in _chunks(head):
            exponents, _ = _exponents(head, rows, own, owned)
            here[0, rows] = exponents.logsumexp(1)
            chances = torch.exp(exponents - here[0, rows, None]).nan_to_num_(nan=0.0)  # a rank without others
            here[1, rows] = (chances * exponents.clamp(min=-1e30)).sum(1)
        ranks = dist.get_world_size(group)
        every = here.new_empty(ranks * 2, len(own))
        _gather_into(every, here, group=group)
        weights, means = every.view(ranks, 2, -1).unbind(1)
        surprise = F.softplus(weights.logsumexp(0), threshold=100.0)  # −logprob
        entropy = surprise - (torch.exp(weights - surprise) * means).sum(0)
        ctx.save_for_backward(hidden, weight, bias, head.targets, owned, own, surprise, entropy)
        ctx.options, ctx.group = options, group
        ctx.set_materialize_grads(False)
        return -surprise, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_logprob, by_entropy = grads
        hidden, weight, bias, targets, owned, own, surprise, entropy = ctx.saved_tensors
        if by_logprob is None and by_entropy is None:
            return (None,) * 7
        head = Head(hidden, weight, targets, bias, *ctx.options)
        direct = torch.zeros_like(own) if by_logprob is None else by_logprob.to(own.dtype)
        indirect = torch.zeros_like(own) if by_entropy is None else by_entropy.to(own.dtype)
        size = torch.maximum(direct.abs(), indirect.abs())
        size = size.where(size > 0, 1.0)  # goes round the products: what they multiply is at most about one
        direct, indirect = direct / size, indirect / size
        d_hidden = own.new_zeros(hidden.shape) if ctx.needs_input_grad[0] else None
        d_weight = own.new_zeros(weight.shape) if ctx.needs_input_grad[1] else None
        d_bias = own.new_zeros(len(weight)) if bias is not None and ctx.needs_input_grad[2] else None
        for rows in _chunks(head):
            exponents, slope = _exponents(head, rows, own, owned)
            log_chances = exponents - surprise[rows, None]
            pull = direct[rows, None] + indirect[rows, None] * (
                log_chances.clamp(min=-1e30) + entropy[rows, None]
            )
            towards = log_chances.exp().mul_(pull).neg_()
            certainty = torch.exp(-surprise[rows])
            at_target = -direct[rows] * torch.expm1(-surprise[rows])
            at_target -= indirect[rows] * certainty * (entropy[rows] - surprise[rows])
            index = targets[rows, None]
            towards.scatter_(1, index, at_target[:, None].where(owned[rows, None], towards.gather(1, index)))
            if slope is not None:
                towards *= slope
            factor = head.scale * size[rows, None]
            low = towards.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = _product(low, weight) * factor
            if d_weight is not None:
                d_weight += _product(low.t(), (hidden[rows] * factor).to(weight.dtype))
            if d_bias is not None:
                d_bias += (towards * factor).sum(0)
        if d_hidden is not None:
            dist.all_reduce(d_hidden, group=ctx.group)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _chunks(head: Head) -> list[slice]:
    """Rows of each chunk; each rank goes its own way through them."""
    count = len(head.hidden)
    size = chunk_rows(count, 4 * len(head.weight), LOGITS_BYTES)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _capped(head: Head, raw: Tensor) -> tuple[Tensor, Tensor | None]:
    """Exponents from raw products with the bias, and the cap's slope there."""
    if head.softcap is None:
        return raw * head.scale, None
    bent = torch.tanh(raw / head.softcap)
    return bent * (head.softcap * head.scale), 1.0 - bent * bent


def _own_exponents(head: Head) -> Tensor:
    """z of each row's target, (N,)."""
    own = torch.empty(len(head.hidden), dtype=head.accumulate, device=head.hidden.device)
    for rows in _chunks(head):
        picked = head.weight[head.targets[rows]].to(head.accumulate)
        own[rows] = (head.hidden[rows].to(head.accumulate) * picked).sum(1)
    if head.bias is not None:
        own += head.bias[head.targets].to(own.dtype)
    return _capped(head, own)[0]


def _exponents(head: Head, rows: slice, own: Tensor, owned: Tensor) -> tuple[Tensor, Tensor | None]:
    """e_j of a chunk (n, V_r), −inf at targets that are here; the cap's slope."""
    raw = _product(head.hidden[rows], head.weight.t())
    if head.bias is not None:
        raw += head.bias.to(raw.dtype)
    exponents, slope = _capped(head, raw)
    exponents -= own[rows, None]
    index = head.targets[rows, None]
    exponents.scatter_(1, index, exponents.gather(1, index).masked_fill(owned[rows, None], -torch.inf))
    return exponents, slope


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 (float64 for float64)."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
