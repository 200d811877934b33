"""A prompt computed once for its whole group: policy, reference and reward model against each sequence alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.policy import Policy
from grpo_fast.models.reward_data import Head
from grpo_fast.models.reward_text import Encoded
from grpo_fast.packing import pack
from tests.tiny_models import byte_tokenizer, causal_model, reward_model

SIZES = {"short": ((9, 5), (1, 3, 8, 2, 11)), "long": ((130, 61), (1, 40, 7, 25, 90))}


def group(size: str) -> tuple[list[list[int]], list[list[int]], list[int]]:
    draw, (prompts, completions) = random.Random(0), SIZES[size]
    rows = [[draw.randrange(256) for _ in range(n)] for n in (*prompts, *completions, *completions)]
    return rows[:2], rows[2:], [0] * len(completions) + [1] * len(completions)


def alone(model, prompts, completions, owner) -> list[Tensor]:
    found = []
    for completion, p in zip(completions, owner, strict=True):
        ids = torch.tensor([prompts[p] + completion])
        table = model(input_ids=ids, use_cache=False).logits[0, len(prompts[p]) - 1 : -1].log_softmax(-1)
        found.append(table.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2"])
@pytest.mark.parametrize("size", SIZES)
def test_policy_and_reference(family: str, size: str) -> None:
    data = group(size)
    model = causal_model(family)
    (batch,) = pack(*data[:2], prompt_of=data[2], token_budget=4096)
    assert batch.plan.shares_prefix and batch.plan.length < sum(map(len, data[0] + data[1]))
    with torch.no_grad():
        want = batch.gather(alone(model, *data))
    policy = Policy.from_model(copy.deepcopy(model), byte_tokenizer())
    adapted = Policy.from_model(copy.deepcopy(model), byte_tokenizer(), lora=LoraSettings(rank=2))
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(0.1)
    results = {
        "policy": policy.logprobs(batch)[0],
        "frozen reference": policy.frozen_copy().logprobs(batch)[0],
        "adapter off": adapted.logprobs(batch, reference=True)[0],
    }
    for name, got in results.items():
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (adapted.logprobs(batch)[0] - want).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@pytest.mark.parametrize("size", SIZES)
def test_reward_model(family: str, size: str) -> None:
    prompts, completions, owner = group(size)
    model = reward_model([Head(name="a"), Head(name="b")], family)
    encoded = Encoded(prompt_ids=prompts, completion_ids=completions, prompt_of=owner)
    (batch,) = model.pack(encoded, 4096)
    assert batch.plan.shares_prefix
    plain = copy.deepcopy(model.model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        want = [
            plain(input_ids=torch.tensor([prompts[p] + ids]), use_cache=False).logits[0]
            for ids, p in zip(completions, owner, strict=True)
        ]
        got = model(batch)
    for row, i in zip(got, batch.sequence_index.tolist(), strict=True):
        torch.testing.assert_close(row, want[i], atol=1e-5, rtol=1e-5)
