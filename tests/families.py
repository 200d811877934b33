"""Tiny random models of several families, and the two ways to compute the log-probs of their completions."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fast.models.head import head_of
from grpo_fast.packing import pack

VOCAB = 97
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# grouped, full and single key heads; tied and untied; windows shorter than the sequences; both softcaps
FAMILIES: dict[str, dict] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 9, "num_key_value_heads": 1},
    "gemma2": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
# attention sinks: packed as the others, but decoded by `transformers`
WITH_SINKS: dict[str, dict] = {
    "gpt_oss": {
        "sliding_window": 6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def tiny_model(family: str, **changes) -> Any:
    """A random `PreTrainedModel` of the family, with weights large enough that attention matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **(FAMILIES | WITH_SINKS).get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(0, 1)
    return model


def ragged(
    seed: int = 0, groups: int = 3, size: int = 4
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Prompts, completions (one of a single token) and the prompt of each completion."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 12))] for _ in range(groups)]
    owner = [g for g in range(groups) for _ in range(size)]
    completions = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 20))] for _ in owner]
    completions[1] = completions[1][:1]
    return prompts, completions, owner


def packed_logprobs(
    model, prompts, completions, owner, *, temperature: float = 1.0, **options
) -> list[Tensor]:
    """Log-probs of every completion, computed packed."""
    results: list[Tensor] = [torch.empty(0)] * len(completions)
    head = head_of(model)
    for batch in pack(prompts, completions, prompt_of=owner, **options):
        batch = batch.to(head.weight.device)
        hidden = model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            plan=batch.plan,
        ).last_hidden_state[0, batch.hidden_index]
        logprobs = (head.logits(hidden) / temperature).log_softmax(-1)
        logprobs = logprobs.gather(1, batch.targets[:, None])[:, 0]
        parts = logprobs.split(batch.cu_seqlens.diff().tolist())
        for index, part in zip(batch.sequence_index.tolist(), parts, strict=True):
            results[index] = part
    return results


def single_logprobs(model, prompts, completions, owner) -> list[Tensor]:
    """The same with transformers' own forward and logits, one sequence a call."""
    results = []
    for completion, p in zip(completions, owner, strict=True):
        ids = torch.tensor([prompts[p] + completion], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompts[p]) - 1 : -1].float()
        results.append(logits.log_softmax(-1).gather(1, ids[0, len(prompts[p]) :, None])[:, 0])
    return results
