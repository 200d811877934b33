"""The output head of a language model as plain numbers: logits = softcap(hidden @ weightᵀ + bias) · scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_fast.errors import UserError

CAST_ROWS = 4096
"""Rows of a 16-bit head that are float32 at a time on the CPU."""


@dataclass(frozen=True)
class HeadSpec:
    """What turns a hidden state of the backbone into logits. V vocabulary, H hidden size."""

    weight: Tensor
    """(V, H); the model's own parameter, tied or not, so gradients reach it"""
    bias: Tensor | None
    """(V,)"""
    softcap: float | None
    """logits become softcap · tanh(logits / softcap)"""
    logit_scale: float
    """last factor on the logits"""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V) logits in float32."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) float32, never rounded to the weight's type on the way: what `linear_logprob` works with."""
        if self.weight.dtype == torch.float32:
            logits = nn.functional.linear(hidden, self.weight, self.bias)
        else:
            hidden = hidden.to(self.weight.dtype)
            if hidden.is_cuda:
                logits = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
            else:
                rows, logits = (
                    hidden.float(),
                    hidden.new_empty(len(hidden), len(self.weight), dtype=torch.float32),
                )
                for first in range(0, len(self.weight), CAST_ROWS):
                    block = slice(first, first + CAST_ROWS)
                    torch.mm(rows, self.weight[block].float().t(), out=logits[:, block])
            if self.bias is not None:
                logits.add_(self.bias)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.logit_scale == 1.0 else logits.mul_(self.logit_scale)


def head_of(model: PreTrainedModel) -> HeadSpec:
    """Read the output head of a causal language model.

    Raises `UserError` naming the module when the head is missing, carries a LoRA adapter, or is quantised.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{name} has no output embeddings; a causal language model is needed")
    if hasattr(head, "base_layer"):
        raise UserError(
            f"{name}'s output head is a {type(head).__module__}.{type(head).__name__}: leave it out of LoRA"
        )
    weight = getattr(head, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or weight.ndim != 2
        or weight.element_size() < 2
    ):
        raise UserError(
            f"{name}'s output head ({type(head).__name__}) is quantised; load the head unquantised"
        )
    bias = getattr(head, "bias", None)
    return HeadSpec(
        weight=weight,
        bias=bias if isinstance(bias, Tensor) else None,
        softcap=_softcap(model),
        logit_scale=_logit_scale(model),
    )


def _softcap(model: PreTrainedModel) -> float | None:
    config = model.config.get_text_config(decoder=True)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return float(cap) if cap else None


def _logit_scale(model: PreTrainedModel) -> float:
    """The families that scale their logits, and how each writes it."""
    config = model.config.get_text_config(decoder=True)
    kind = str(getattr(config, "model_type", ""))
    if kind.startswith("cohere"):
        scale = getattr(config, "logit_scale", None)
        return 1.0 if scale is None else float(scale)
    if kind.startswith("granite"):
        return 1.0 / float(getattr(config, "logits_scaling", 1.0))
    if kind == "hyperclovax":
        return float(getattr(config, "logits_scaling", 1.0))
    return 1.0
