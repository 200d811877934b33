"""One GRPO update of a tiny policy in bfloat16 on a CUDA device: rollout, packed forward, fused loss, step."""

import copy
import math
from typing import Any

import pytest
import torch

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.settings import (
    LossSettings,
    OptimSettings,
    PolicySettings,
    RolloutSettings,
    TrainConfig,
)
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.grpo import update
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.packing import PackedBatch, pack
from grpo_fast.rollout import Rollout
from grpo_fast.scoring import Scored
from tests.tiny import causal_lm

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GROUP, PROMPTS = 4, 3
LENGTHS = [1, 40, 7, 23, 12, 64, 3, 31, 18, 2, 55, 9]


def policy(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = causal_lm("qwen2", len(tokenizer), hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    model.to(DEVICE, torch.bfloat16)  # type: ignore[call-arg]
    return Policy.from_model(model, tokenizer)


def rollout() -> Rollout:
    """Ragged groups of made-up completions and advantages."""
    draw = torch.Generator().manual_seed(1)
    completions = [
        Completion(
            torch.randint(5, 500, (length,), generator=draw).tolist(),
            -torch.rand(length, generator=draw) * 3,
            "stop",
            0,
        )
        for length in LENGTHS
    ]
    prompts = [
        Prompt(f"p{index}", torch.randint(5, 500, (6 + 9 * index,), generator=draw).tolist(), None, {})
        for index in range(PROMPTS)
    ]
    return Rollout(
        prompts=prompts,
        prompt_of=[index // GROUP for index in range(len(LENGTHS))],
        completions=completions,
        texts=[""] * len(LENGTHS),
        scored=Scored(rewards=torch.zeros(len(LENGTHS), 1), spread=torch.zeros(len(LENGTHS), 1)),
        advantages=torch.randn(len(LENGTHS), generator=draw),
    )


def settings(preset: Any, backend: Any, token_budget: int) -> TrainConfig:
    return TrainConfig(
        policy=PolicySettings(backend=backend),
        loss=LossSettings(preset=preset),
        optim=OptimSettings(token_budget=token_budget),
        rollout=RolloutSettings(group_size=GROUP, max_new_tokens=64, prompts_per_step=PROMPTS),
        engine=EngineSettings(max_mismatch=0.0),  # the rollouts' log-probs are made up
    )


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("token_budget", [8192, 128], ids=["one batch", "many batches"])
def test_update(preset, backend, token_budget):
    model = policy()
    reference = policy(seed=3) if preset == "grpo" else None
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = Optimizer(model.trainable_parameters(), lr=1e-2)
    metrics = update(
        model, optimizer, rollout(), settings(preset, backend, token_budget), lr=1e-2, reference=reference
    )
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0 and metrics["skipped_updates"] == 0
    assert metrics["trained_tokens"] == sum(LENGTHS)
    for name, value in model.named_parameters():
        assert value.isfinite().all(), name
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert any("embed_tokens" in name for name in changed) and len(changed) > len(before) // 2


def test_packed_equals_one_by_one():
    model, data = policy(), rollout()
    model.eval()
    found = []
    for token_budget, share_prefix in ((8192, True), (1, False)):
        batches = pack(
            [prompt.token_ids for prompt in data.prompts],
            [completion.token_ids for completion in data.completions],
            prompt_of=data.prompt_of,
            token_budget=token_budget,
            share_prefix=share_prefix,
        )
        found.append(by_sequence(model, batches))
    assert len(found[0]) == len(found[1]) == len(LENGTHS)
    for index, values in found[0].items():
        assert values.shape == (LENGTHS[index],)
        # bfloat16 hidden states of another shape of product
        torch.testing.assert_close(values, found[1][index], rtol=0, atol=5e-2)


def by_sequence(model: Policy, batches: list[PackedBatch]) -> dict[int, torch.Tensor]:
    found = {}
    for batch in batches:
        logprobs, _ = model.logprobs(batch.to(torch.device(DEVICE)))
        parts = logprobs.cpu().split(batch.cu_seqlens.cpu().diff().tolist())
        found |= dict(zip(batch.sequence_index.tolist(), parts, strict=True))
    return found


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_an_update_changes_the_policy_and_its_engine_agrees(family, preset):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = causal_lm(family, len(tokenizer), hidden_size=256, intermediate_size=512)
    model.to(DEVICE, torch.bfloat16)  # type: ignore[call-arg]
    policy = Policy.from_model(model, tokenizer)
    policy.self_check()
    reference = policy.frozen_copy() if preset == "grpo" else None
    prompts = [Prompt(str(i), list(range(5 + i, 15 + i)), None, {}) for i in range(4)]
    sampling = Sampling(max_new_tokens=24, stop_token_ids=policy.stop_token_ids)
    completions = LocalEngine(policy.model).generate([p.token_ids for p in prompts], 4, sampling, 0)
    rollout = Rollout(
        prompts=prompts,
        prompt_of=[i // 4 for i in range(16)],
        completions=completions,
        texts=[""] * 16,
        scored=Scored(rewards=torch.zeros(16, 1), spread=torch.zeros(16, 1)),
        advantages=torch.linspace(-1, 1, 16),
    )
    config = TrainConfig(
        loss=LossSettings(preset=preset),
        optim=OptimSettings(token_budget=256),
        rollout=RolloutSettings(prompts_per_step=4, group_size=4, max_new_tokens=24),
    )
    before = copy.deepcopy(policy.state_dict())
    optimizer = Optimizer(policy.trainable_parameters(), lr=1e-2)
    metrics = update(policy, optimizer, rollout, config, lr=1e-2, reference=reference)
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0
    assert metrics["mismatch_mean"] < 0.05  # bfloat16 rounds differently in prefill, decode and packed passes
    assert any(not torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_ligers_body_computes_what_the_plain_one_does():
    pytest.importorskip("liger_kernel")
    from grpo_fast.models.liger import apply_liger

    plain = policy()
    other = copy.deepcopy(plain.model)
    ids = torch.randint(5, 500, (1, 48), device=DEVICE)
    exact = copy.deepcopy(plain.model).double()
    with torch.no_grad():
        truth = exact.set_attn_implementation("sdpa") or exact(ids, use_cache=False).logits
        plain.model.set_attn_implementation("sdpa")
        other.set_attn_implementation("sdpa")
        wanted = plain.model(ids, use_cache=False).logits.double()
        apply_liger(other)
        found = other(ids, use_cache=False).logits.double()
    assert (found - truth).abs().max() <= 1.5 * (wanted - truth).abs().max() + 1e-3
