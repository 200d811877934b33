"""Small models and runs for the tests of the trainer: built from configurations, nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from grpo_fast.miniature.tokenizer import build_tokenizer

# A complete miniature run in a few seconds: too small to learn anything worth reading.
TINY_MINIATURE = """
[miniature]
hidden = 32
layers = 1
heads = 2
demonstrations = 128
warm_epochs = 1
labelled = 128
reward_epochs = 1
batch_size = 32

[rollout]
prompts_per_step = 4
group_size = 4
max_new_tokens = 16

[data]
eval_size = 12

[run]
steps = 6
save_every = 2
samples = 3
"""


def causal_lm(family: str, vocabulary: int, **overrides) -> PreTrainedModel:
    """A two-layer model of `family` (qwen2, llama, gemma2) with random weights from the current seed."""
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    softcaps = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 8}
    kind, own = {
        "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
        "llama": (LlamaConfig, {"tie_word_embeddings": False}),
        "gemma2": (Gemma2Config, {"head_dim": 8, **softcaps}),
    }[family]
    config: PreTrainedConfig = kind(**(shape | own | overrides))
    return AutoModelForCausalLM.from_config(config)


def save_policy(folder: Path, family: str, **overrides) -> Path:
    """A saved model of `family` with the miniature's tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = causal_lm(family, len(tokenizer), **overrides)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path, n: int = 32, **columns) -> Path:
    """A JSONL file of `n` plain prompts."""
    rows = [{"prompt": f"tell me about the number {i}", **columns} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(path: Path, text: str = TINY_MINIATURE) -> Path:
    """A recipe file."""
    path.write_text(text, encoding="utf-8")
    return path
