"""Tiny models and a byte-level tokenizer, built in memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel

PAD, END = "<|pad|>", "<|end|>"
VOCAB = 264  # 256 bytes, two special tokens, and a few rows no token uses, as real models have

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # large enough for every layer to matter
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 257,
}

# what cannot be packed: convolutions, linear attention, recurrence, an attention of its own
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 8,
    },
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 2},
}


def byte_tokenizer(*, pad: str = PAD, end: str = END) -> PreTrainedTokenizerBase:
    """One token a byte; ids 256 and 257 are padding and end (pad=END makes them the same)."""
    vocab = {char: i for i, char in enumerate(bytes_to_unicode().values())} | {PAD: 256, END: 257}
    return Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=PAD, pad_token=pad, eos_token=end)


def config_of(family: str, **overrides: Any) -> PreTrainedConfig:
    """qwen2 (tied head), llama (untied), mistral and gemma2 (tied, both softcaps), these two with a window of 8."""
    own: dict[str, Any] = {
        "qwen2": {"tie_word_embeddings": True},
        "llama": {"tie_word_embeddings": False},
        "mistral": {"tie_word_embeddings": False, "sliding_window": 8},
        "gemma2": {
            "head_dim": 8,
            "sliding_window": 8,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 8,
        },
    }[family]
    kinds = {"qwen2": Qwen2Config, "llama": LlamaConfig, "mistral": MistralConfig, "gemma2": Gemma2Config}
    return kinds[family](**(own | SIZES | overrides))


def causal_model(family: str = "qwen2", *, seed: int = 0, **overrides) -> PreTrainedModel:
    """A causal language model with random float32 weights, in plain `transformers` form."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config_of(family, **overrides))


def reward_model(
    heads: list[Head] | Layout,
    family: str = "qwen2",
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **overrides,
) -> RewardModel:
    """A reward model with random float32 weights and these heads."""
    layout = heads if isinstance(heads, Layout) else Layout(heads=tuple(heads))
    config = config_of(family, **overrides)
    return RewardModel.from_config(config, tokenizer or byte_tokenizer(), layout, seed=seed)
