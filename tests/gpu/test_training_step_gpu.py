"""One update of a small policy on the device in bfloat16: rollout, packed forward, fused loss, optimizer step."""

import copy

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

pytest.importorskip("peft")


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_an_update_changes_the_policy_and_its_engine_agrees(family, preset):
    from grpo_fast.config.settings import LossSettings, OptimSettings, RolloutSettings, TrainConfig
    from grpo_fast.data.prompts import Prompt
    from grpo_fast.engines.base import Sampling
    from grpo_fast.engines.local import LocalEngine
    from grpo_fast.grpo import update
    from grpo_fast.miniature.tokenizer import build_tokenizer
    from grpo_fast.models.policy import Policy
    from grpo_fast.optim import Optimizer
    from grpo_fast.rollout import Rollout
    from tests.tiny import causal_lm

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = causal_lm(family, len(tokenizer), hidden_size=256, intermediate_size=512).to(
        "cuda", torch.bfloat16
    )
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
        rewards=torch.zeros(16, 1),
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
