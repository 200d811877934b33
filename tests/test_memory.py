"""The memory estimate against what a real forward pass keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import byte_tokenizer, causal_model, config_of
from transformers import Qwen2Config

from grpo_fast.models.head import head_of
from grpo_fast.models.memory import activation_bytes, count_parameters, memory_estimate
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.packing import pack

SEVEN_B = Qwen2Config(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_parameters_are_counted_exactly(family: str):
    model = causal_model(family)
    counts = count_parameters(config_of(family))
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.head == head_of(model).weight.numel()
    policy = Policy.from_model(model, byte_tokenizer(), lora=LoraSettings(rank=4))
    assert 4 * counts.lora_per_rank == sum(p.numel() for p in policy.trainable_parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_near_what_autograd_keeps(checkpointing: bool):
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    policy = Policy.from_model(causal_model(**wide), byte_tokenizer(), gradient_checkpointing=checkpointing)
    policy.model.set_attn_implementation("sdpa")  # keeps no probabilities, as on a GPU
    (batch,) = pack([[1] * 100], [[2] * 101], token_budget=4096)
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in policy.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.hidden_states(batch)
    measured = sum(kept.values())
    assert hidden.requires_grad
    tokens = batch.input_ids.shape[1]
    config = policy.model.config
    estimate = activation_bytes(config, tokens=tokens, item=4, gradient_checkpointing=False)
    if checkpointing:
        layer_alone = estimate / wide["num_hidden_layers"]
        estimate = activation_bytes(config, tokens=tokens, item=4, gradient_checkpointing=True) - layer_alone
    assert measured == pytest.approx(estimate, rel=0.1)


def test_seven_billion_parameters():
    options: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "token_budget": 16_384,
        "gradient_checkpointing": True,
    }
    full = memory_estimate(SEVEN_B, needs_reference=True, rollout_rows=64, rollout_tokens=1024, **options)
    assert full.parameters == full.reference == 2 * 7_615_616_512
    assert full.optimizer == 12 * 7_615_616_512
    assert full.kv_cache == 64 * 1024 * 2 * 28 * 4 * 128 * 2
    lora = memory_estimate(SEVEN_B, lora_rank=16, needs_reference=True, reward_models=[SEVEN_B], **options)
    assert lora.reference == 0 and lora.optimizer < 1e9 < lora.parameters
    assert lora.reward_model > 4 * (7.6e9 - 2 * 152_064 * 3584)
    two = memory_estimate(SEVEN_B, lora_rank=16, reward_models=[SEVEN_B, SEVEN_B], **options)
    assert two.reward_model == 2 * lora.reward_model
    half = memory_estimate(SEVEN_B, reward_models=[SEVEN_B], reward_dtype=torch.bfloat16, **options)
    assert 2 * half.reward_model == lora.reward_model
    assert full.total > 120 * 2**30 > 60 * 2**30 > lora.total - lora.reward_model > lora.parameters
    assert lora.as_dict()["total"] == lora.total
