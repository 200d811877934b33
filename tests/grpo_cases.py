"""A tiny policy, a made-up rollout, and the gradient of one update on them."""

import copy
from typing import Any

import torch

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.settings import LossSettings, OptimSettings, RolloutSettings, TrainConfig
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.base import Completion
from grpo_fast.grpo import update
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.policy import Policy
from grpo_fast.models.sharded import full
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.parallel.world import ALONE, World
from grpo_fast.rollout import Rollout
from grpo_fast.scoring import Scored
from tests.tiny import causal_lm

GROUP = 4


def policy(seed: int = 0, *, family: str = "qwen2", **settings) -> Policy:
    """A tiny policy of random weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return Policy.from_model(causal_lm(family, len(tokenizer)), tokenizer, **settings)


def rollout(prompts: int = 3, *, flat: int | None = None, seed: int = 1) -> Rollout:
    """Ragged groups with made-up advantages; group `flat` has none."""
    draw = torch.Generator().manual_seed(seed)
    completions, prompt_of = [], []
    for index in range(prompts):
        for _ in range(GROUP):
            length = int(torch.randint(1, 12, (), generator=draw))
            ids = torch.randint(5, 500, (length,), generator=draw).tolist()
            logprobs = -torch.rand(length, generator=draw) * 3
            completions.append(Completion(ids, logprobs, "stop" if length < 9 else "length", 0))
            prompt_of.append(index)
    advantages = torch.randn(prompts * GROUP, generator=draw)
    if flat is not None:
        advantages[flat * GROUP : (flat + 1) * GROUP] = 0
    asked = [
        Prompt(f"p{i}", torch.randint(5, 500, (4 + i,), generator=draw).tolist(), None, {})
        for i in range(prompts)
    ]
    return Rollout(
        prompts=asked,
        prompt_of=prompt_of,
        completions=completions,
        texts=[""] * len(completions),
        scored=Scored(rewards=torch.zeros(len(completions), 1), spread=torch.zeros(len(completions), 1)),
        advantages=advantages,
    )


def config(preset: Any = "dapo", token_budget: int = 8192, **loss) -> TrainConfig:
    """Settings of one update."""
    return TrainConfig(
        loss=LossSettings(preset=preset, **loss),
        optim=OptimSettings(token_budget=token_budget),
        rollout=RolloutSettings(group_size=GROUP, max_new_tokens=12, prompts_per_step=3),
        engine=EngineSettings(max_mismatch=0.0),  # the rollouts' log-probs are made up
    )


def gradients(
    model: Policy,
    data: Rollout,
    settings: TrainConfig,
    reference: Policy | None = None,
    *,
    world: World = ALONE,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The summed gradient of one optimizer step, by parameter, and the update's metrics.

    On several processes weights are shared out first, and the gradients gathered in the end.
    """
    model, reference = copy.deepcopy(model), copy.deepcopy(reference)
    for each in (model, reference):
        if each is not None:
            each.shard(world, head_by_vocabulary=settings.parallel.head == "vocabulary")
    found: dict[str, torch.Tensor] = {}

    class Probe(Optimizer):
        def step(self, lr, **given):
            named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            found.update({name: full(grad).clone() for name, grad in named})
            return super().step(lr, **given)

    metrics = update(
        model, Probe(model.trainable_parameters(), lr=0.0), data, settings, lr=0.0, reference=reference
    )
    return found, metrics
