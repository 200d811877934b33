"""The matrix products one position of a decoder goes through, read off the model's own modules on the meta device.

Letters: H hidden size, V vocabulary, D width of a head's queries and keys, Dv of its values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo_fast.attention import paths
from grpo_fast.attention.function import config_obstacle
from grpo_fast.errors import UserError
from grpo_fast.memory.live import META
from grpo_fast.memory.passes import meta_policy
from grpo_fast.models.head import head_of
from grpo_fast.models.lora import LoraSettings

WATCHED = "grpo_fast_watched"
POSITIONS = 8
"""Of the pass that is watched."""


class AttentionLayers(NamedTuple):
    """Layers whose attention is alike."""

    heads: int
    """Query heads"""
    key_heads: int
    dim: int
    """D"""
    value_dim: int
    """Dv"""
    window: int | None
    """Keys a query sees at most, itself among them"""
    count: int
    """Layers"""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What FLOPs are counted from. Multiply-adds are of one position, all layers together, the head left out."""

    forward: int
    """Multiply-adds of the body's matrix products, adapters among them"""
    by_input: int
    """Of the products that give the inputs' gradients; with an adapter the first layer's need none"""
    by_weight: int
    """Of those that give the trained weights' gradients"""
    recomputed: int
    """Of the forward products that checkpointing repeats in the backward pass: each layer's up to its last but one,
    for the last one's result is not needed"""
    checkpointing: bool
    attention: tuple[AttentionLayers, ...]
    hidden: int
    """H"""
    vocabulary: int
    """V; 0 of a model with `outputs` in place of a language model's head"""
    outputs: int
    """Numbers that a reward or value model reads off a hidden state; 0 of a language model"""
    trained_head: bool
    """Whether the head's weight has a gradient: no with an adapter"""
    causal: bool = True
    """Count the pairs of query and key that see each other; False: every segment's whole rectangle of queries and
    keys, masked pairs among them, as `torch.utils.flop_counter` does and padded kernels compute"""

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        lora: LoraSettings | None = None,
        heads: int = 0,
        *,
        checkpointing: bool = False,
    ) -> Architecture:
        """Of any decoder that can be packed; `heads`: outputs of a reward or value model (0: a language model).

        One forward and backward pass of the model itself, without storage, is watched. UserError for a model with
        experts or layers that are not attention, and for LoRA targets that name no layer.
        """
        model = meta_policy(config, lora=lora, gradient_checkpointing=checkpointing)
        name = type(model).__name__
        if why := config_obstacle(type(model), config):
            raise UserError(f"{name}: its FLOPs cannot be counted: {why}")
        if any(p.ndim > 2 for p in model.parameters()):
            raise UserError(f"{name}: its FLOPs cannot be counted: it has experts or convolutions")
        seen = _Seen()
        model.set_attn_implementation(WATCHED)
        base = cast(Any, model.base_model)
        ids = torch.empty(1, POSITIONS, dtype=torch.int64, device=META)
        with _watched(model, seen):
            states = base(
                input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False, plan=seen
            ).last_hidden_state
            seen.backward = True
            states.backward(torch.empty_like(states))
        weight = head_of(model).weight
        return cls(
            forward=seen.forward // POSITIONS,
            by_input=seen.by_input // POSITIONS,
            by_weight=seen.by_weight // POSITIONS,
            recomputed=seen.recomputed // POSITIONS,
            checkpointing=checkpointing,
            attention=tuple(AttentionLayers(*layer, count) for layer, count in seen.layers.items()),
            hidden=weight.shape[1],
            vocabulary=0 if heads else weight.shape[0],
            outputs=heads,
            trained_head=bool(heads) or lora is None,
        )


@dataclass
class _Seen:
    """What the watched pass multiplied and added; travels through the model as `plan=`."""

    layers: Counter[tuple[int, int, int, int, int | None]] = field(default_factory=Counter)
    """(heads, key heads, D, Dv, window) of the attention layers"""
    forward: int = 0
    by_input: int = 0
    by_weight: int = 0
    recomputed: int = 0
    backward: bool = False
    """Whether the backward pass has begun"""


def _attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, L, D)
    key: Tensor,
    value: Tensor,  # (1, key heads, L, Dv)
    attention_mask: Tensor | None = None,
    sliding_window: int | None = None,
    plan: _Seen | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert plan is not None
    if not plan.backward:
        plan.layers[query.shape[1], key.shape[1], query.shape[3], value.shape[3], sliding_window] += 1
    return paths.causal(query, key, value, scale=None, window=None).transpose(1, 2), None


@contextmanager
def _watched(model: PreTrainedModel, seen: _Seen) -> Iterator[None]:
    """Adds up the multiply-adds of every linear layer of the body that runs."""

    def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        weight = cast(Tensor, module.weight)
        size = math.prod(output.shape[:-1]) * weight.numel()
        if seen.backward:
            seen.recomputed += size
            return
        seen.forward += size
        seen.by_input += size * args[0].requires_grad
        seen.by_weight += size * weight.requires_grad

    head = model.get_output_embeddings()
    handles = [
        module.register_forward_hook(watch)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


AttentionInterface.register(WATCHED, _attention)
