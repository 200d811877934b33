"""How much memory a training step will need, from the model's configuration alone.

Plain arithmetic over what is known to be stored; nothing is loaded. It is an estimate of what the tensors
hold, not of what an allocator reserves: leave a tenth for fragmentation and the CUDA context.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

HEAD_SCRATCH_BYTES = 512 * 2**20  # what the loss head may use for one chunk of tokens on an accelerator


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters, counted on a model without storage."""

    total: int
    """All of them, a tied head counted once."""
    head: int
    """The head's V x H."""
    lora_per_rank: int
    """in + out over every linear layer except the head: times the rank it is the adapter's size."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the training device, part by part."""

    parameters: int
    """The policy's weights in their dtype."""
    reference: int
    """The frozen reference of full fine-tuning with kl_coef > 0; LoRA needs none."""
    gradients: int
    """One float32 number a trainable parameter (micro-batches are added up in float32)."""
    optimizer: int
    """AdamW's two float32 moments (Adafactor: next to nothing) and, for bfloat16 parameters, the float32 masters."""
    activations: int
    """What one micro-batch keeps for its backward pass."""
    head_scratch: int
    """One chunk of the loss head and, where the head is trained, its float32 gradient sum."""
    kv_cache: int
    """Keys and values of the rollouts in flight."""
    reward_model: int
    """Weights of the reward model."""

    @property
    def total(self) -> int:
        """The largest moment: rollouts and updates take turns, so the larger of the two counts."""
        resident = self.parameters + self.reference + self.optimizer + self.reward_model
        return resident + max(self.kv_cache, self.gradients + self.activations + self.head_scratch)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def count_parameters(config: PreTrainedConfig) -> ParameterCounts:
    """Count on the meta device: exact for every architecture, and no memory is used."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return ParameterCounts(
        total=sum(p.numel() for p in model.parameters()),
        head=head.weight.numel(),
        lora_per_rank=sum(m.in_features + m.out_features for m in linear),
    )


def activation_bytes(
    config: PreTrainedConfig, *, tokens: int, item: int, gradient_checkpointing: bool
) -> int:
    """Bytes a packed row of `tokens` keeps for the backward pass of a gated, pre-norm decoder.

    A layer keeps, per position: of two norms the input in float32, the normalised and the scaled value; the
    rotated queries and keys, the values and the attention output; of the gated MLP gate, activation, up and
    their product. With checkpointing a layer keeps its input only, and one layer at a time is whole.
    Attention itself is taken to keep nothing else, as flash kernels do; short segments on the CPU also keep
    their probabilities.
    """
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    norms = 2 * hidden * (2 * item + 4)
    attention = item * head_dim * (2 * heads + 2 * kv_heads)
    mlp = item * 4 * inner
    layer = tokens * (norms + attention + mlp)
    ends = tokens * hidden * (2 * item + 4)  # the final norm
    if gradient_checkpointing:
        return layers * tokens * hidden * item + layer + ends
    return layers * layer + ends


def memory_estimate(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    token_budget: int,
    lora_rank: int | None = None,
    lora_all_linear: bool = True,
    gradient_checkpointing: bool = False,
    needs_reference: bool = False,
    rollout_rows: int = 0,
    rollout_tokens: int = 0,
    reward_models: Sequence[PreTrainedConfig] = (),
    reward_dtype: torch.dtype = torch.float32,
    optimizer: Literal["adamw", "adafactor"] = "adamw",
    head_scratch_bytes: int = HEAD_SCRATCH_BYTES,
) -> MemoryEstimate:
    """Estimate a training step of the policy `config` describes.

    `token_budget`: packed positions of a micro-batch. `lora_rank`: None for full fine-tuning;
    `lora_all_linear=False` (adapters on named layers only) makes the adapter's size an upper bound.
    `needs_reference`: kl_coef > 0. `rollout_rows` completions are generated at once, each of at most
    `rollout_tokens` positions with its prompt.
    """
    counts = count_parameters(config)
    item = dtype.itemsize
    full = lora_rank is None
    adapter = 0 if lora_rank is None else lora_rank * counts.lora_per_rank
    trainable = counts.total if full else adapter
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kv_per_token = 2 * text.num_hidden_layers * kv_heads * head_dim * item
    scratch = min(head_scratch_bytes, token_budget * text.vocab_size * (4 + item))
    reward = 0
    for reward_model in reward_models:
        found = count_parameters(reward_model)
        tied = getattr(reward_model.get_text_config(), "tie_word_embeddings", False)
        reward += (found.total - (0 if tied else found.head)) * reward_dtype.itemsize
    return MemoryEstimate(
        parameters=(counts.total + adapter) * item,
        reference=counts.total * item if full and needs_reference else 0,
        gradients=trainable * 4,
        optimizer=trainable * ((8 if optimizer == "adamw" else 0) + (0 if item == 4 else 4)),
        activations=activation_bytes(
            config, tokens=token_budget, item=item, gradient_checkpointing=gradient_checkpointing
        ),
        head_scratch=scratch + (counts.head * 4 if full else 0),
        kv_cache=rollout_rows * rollout_tokens * kv_per_token,
        reward_model=reward,
    )
