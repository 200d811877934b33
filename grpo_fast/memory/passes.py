"""What forward and backward passes keep and reach at most: the model itself runs on the meta device and is watched.

Exact for every architecture, adapters and checkpointing included, since it is their own code that runs. Letters: L
packed positions, N completion tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from grpo_fast.attention.plan import PackedPlan
from grpo_fast.memory.attention import COUNTED, CountedPlan
from grpo_fast.memory.live import META, Live
from grpo_fast.models import pretrained
from grpo_fast.models.head import head_of
from grpo_fast.models.lora import LoraSettings, add_lora


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters."""

    total: int
    """All of the model without its adapter, a tied head counted once."""
    head: int
    """The head's V x H."""
    trained: int
    """What the optimizer updates."""
    adapter: int
    """The LoRA adapter; 0 without one."""
    frozen_linear: int
    """Weights of linear layers that are not trained, the head left out: what 4-bit storage makes smaller."""
    largest: int
    """The largest trained tensor."""
    factored: int
    """Rows and columns of every trained matrix, and the trained vectors: Adafactor's state."""


@dataclass(frozen=True, kw_only=True)
class UpdateBytes:
    """One micro-batch, bytes; gradients are float32."""

    kept: int
    """What the body keeps for its backward pass."""
    gradients: int
    """Gradient sums at the end."""
    at_head: int
    """Alive while the loss head works, its scratch aside: gradient sums so far, kept tensors, the head's results."""
    peak: int
    """Most alive at once, gradient sums among it and the head's scratch aside."""


def meta_policy(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    lora: LoraSettings | None = None,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """The policy without storage. UserError where an adapter's targets name no layer."""
    with META:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=COUNTED
        )
        if lora is not None:
            add_lora(model, lora)
    pretrained.switch_off_dropout(model)
    if gradient_checkpointing:
        pretrained.enable_gradient_checkpointing(model, "model")
    return model.train()


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """Counts of a policy from `meta_policy`, or of any other."""
    head = cast(nn.Module, model.get_output_embeddings())
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    linear = [m.weight for m in model.modules() if type(m) is nn.Linear and m is not head]
    return ParameterCounts(
        total=sum(p.numel() for p in model.parameters()) - adapter,
        head=cast(Tensor, head.weight).numel(),
        trained=sum(p.numel() for p in trained),
        adapter=adapter,
        frozen_linear=sum(w.numel() for w in linear if not w.requires_grad),
        largest=max((p.numel() for p in trained), default=0),
        factored=sum(_factored(p) for p in trained),
    )


def _factored(parameter: Tensor) -> int:
    if parameter.ndim < 2:
        return parameter.numel()
    rows, columns = parameter.shape[-2:]
    return parameter.numel() // (rows * columns) * (rows + columns)


def update_bytes(model: PreTrainedModel, plan: PackedPlan, device: str, *, micro_batches: int) -> UpdateBytes:
    """Micro-batches laid out as `plan`, forward and backward, on a device of kind `device`; the largest counts.

    From the second one on the gradient sums are there from the start.
    """
    for parameter in model.parameters():
        parameter.grad = None
    sums = _float_sums([p for p in model.parameters() if p.requires_grad and p.dtype != torch.float32])
    head = head_of(model)
    kept = at_head = 0
    with Live() as live:
        for _ in range(min(2, micro_batches)):
            before = live.now
            states = _packed_states(model, plan, device)
            kept = max(kept, live.now - before)
            loss = cast(Tensor, _Head.apply(states, head.weight, head.bias))
            at_head = max(at_head, live.now)
            del states
            loss.backward()
            del loss
        gradients = live.now
    for parameter in model.parameters():
        parameter.grad = None
    del sums
    return UpdateBytes(kept=kept, gradients=gradients, at_head=at_head, peak=live.peak)


def _packed_states(model: PreTrainedModel, plan: PackedPlan, device: str) -> Tensor:
    """Hidden states of the N positions that predict a completion token, (N, H)."""
    output = _body(model, plan.length, CountedPlan(plan, device))
    index = torch.empty(completion_positions(plan), dtype=torch.int64, device=META)
    return output[0].index_select(0, index)


def _body(model: PreTrainedModel, length: int, plan: CountedPlan) -> Tensor:
    """Last hidden states (1, L, H) of a packed row."""
    ids = torch.empty(1, length, dtype=torch.int64, device=META)
    base = cast(Any, model.base_model)
    output = base(input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False, plan=plan)
    return output.last_hidden_state


class _Head(torch.autograd.Function):
    """The loss head to the eye of the allocator: gradients are made in the forward pass and handed on."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inputs = zip((states, weight, bias), ctx.needs_input_grad, strict=True)
        ctx.gradients = [torch.empty_like(x) if needed and x is not None else None for x, needed in inputs]
        return states.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(gradients)


def _float_sums(parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
    """Gradients added up in float32 as the optimizer does it: the narrow one is freed at once."""
    sums: dict[int, Tensor] = {}

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, key = parameter.grad.float(), id(parameter)
        sums[key] = sums[key].add_(gradient) if key in sums else gradient
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(collect)
    return sums


@torch.no_grad()
def prefill_bytes(model: PreTrainedModel, lengths: Sequence[int], device: str) -> tuple[int, int]:
    """Bytes of the prompts' keys and values, and most alive at once, while prompts of `lengths` are read."""
    kept: list[Tensor] = []
    plan = PackedPlan.of_lengths(lengths)
    with Live() as live:
        states = _body(model, plan.length, CountedPlan(plan, device, kept))
        del states
        cached = live.now
        kept.clear()
    return cached, live.peak


@torch.no_grad()
def scoring_bytes(
    config: PreTrainedConfig, plan: PackedPlan, device: str, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of a reward model's weights, and most alive at once while it reads a row laid out as `plan`.

    The middle layer's states stay for the features, of which the mean over each reply is taken in float32.
    """
    with META:
        model = AutoModelForSequenceClassification.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=COUNTED
        ).eval()
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    with Live() as live:
        states = _body(model, plan.length, CountedPlan(plan, device))
        del states
    width = config.get_text_config().hidden_size
    layer = plan.length * width * dtype.itemsize
    copies = 0 if dtype == torch.float32 else 4 * plan.length * width
    features = 2 * layer + copies + 4 * completion_positions(plan) * width
    return weights, max(live.peak + layer, features)


def completion_positions(plan: PackedPlan) -> int:
    """N of a row: the completions' positions, and for each completion the prompt's last."""
    return sum(q + 1 for q, prefix in zip(plan.q_lens, plan.prefix_lens, strict=True) if prefix)
