"""The one step that every ablation takes: its rollout, its models, and how large they are.

Letters: P prompts, G completions a prompt, S = P·G, R reward heads.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from grpo_kernels import group_advantages
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.step.work import SMALL, TINY, Shape, model_of, tokenizer_of
from grpo_fast.engines.local import LocalEngine
from grpo_fast.models.policy import Policy
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_text import Encoded

HEADS = ("safety", "politeness", "meaningfulness", "actionability")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much one step is."""

    shape: Shape
    """Of the policy, and of the reward model's backbone."""
    prompts: int
    group: int
    prompt_tokens: tuple[int, int]
    """Shortest and longest prompt; lengths in between are equally likely."""
    median: int
    """Of the completions' lengths, log-normal with sigma 0.8."""
    longest: int
    """Completions are cut off here."""
    flat: float
    """Share of the groups whose rewards are all alike."""
    new_tokens: int
    """Tokens of every completion where generation is measured: the end token ends nothing there."""
    token_budget: int = 8192
    padded_rows: int = 16
    """Sequences of a padded batch."""

    def described(self) -> dict[str, Any]:
        return asdict(self)


FULL = Scale(
    shape=SMALL, prompts=4, group=8, prompt_tokens=(48, 160), median=48, longest=160, flat=0.25, new_tokens=48
)
QUICK = replace(
    FULL,
    shape=replace(TINY, hidden=64, layers=2, inner=192, vocabulary=2048),
    prompts=4,
    group=4,
    prompt_tokens=(16, 48),
    median=16,
    longest=48,
    new_tokens=12,
    padded_rows=8,
)
WARM_UP = replace(
    QUICK,
    shape=replace(TINY, hidden=32, layers=1, inner=64, vocabulary=512),
    prompts=2,
    group=2,
    flat=0.5,
    new_tokens=4,
    padded_rows=2,
)
"""So small that what it leaves in memory is nothing, and long enough to load every library that a step uses."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A rollout with random tokens, group after group."""

    prompts: list[list[int]]
    completions: list[list[int]]
    prompt_of: list[int]  # (S,)
    rewards: Tensor  # (S, R)
    advantages: Tensor  # (S,)

    @property
    def kept(self) -> list[int]:
        """The sequences with signal."""
        return [i for i, advantage in enumerate(self.advantages.tolist()) if advantage != 0]


class World:
    """Everything a step may need, each part built when it is first asked for: a process holds what it uses."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.scale.shape.vocabulary)

    @cached_property
    def made(self) -> Made:
        """The rollout of every contender."""
        scale, draw = self.scale, random.Random(0)

        def tokens(count: int) -> list[int]:
            return draw.choices(range(scale.shape.vocabulary - 2), k=count)

        prompts = [tokens(draw.randint(*scale.prompt_tokens)) for _ in range(scale.prompts)]
        owner = [p for p in range(scale.prompts) for _ in range(scale.group)]
        completions = [
            tokens(min(scale.longest, max(4, round(scale.median * draw.lognormvariate(0.0, 0.8)))))
            for _ in owner
        ]
        rewards = torch.rand(len(owner), len(HEADS), generator=torch.Generator().manual_seed(0))
        rewards[: round(scale.flat * scale.prompts) * scale.group] = 0.5
        advantages = group_advantages(rewards, group_size=scale.group, mode="scalarized")
        return Made(
            prompts=prompts,
            completions=completions,
            prompt_of=owner,
            rewards=rewards,
            advantages=advantages,
        )

    @cached_property
    def policy(self) -> Policy:
        return Policy.from_model(model_of(self.scale.shape, self.tokenizer), self.tokenizer)

    @cached_property
    def padded(self) -> PreTrainedModel:
        """The same weights in a model as transformers has it."""
        return model_of(self.scale.shape, self.tokenizer).train()

    @cached_property
    def reference(self) -> Policy:
        """The frozen copy that a KL term compares with."""
        return self.policy.frozen_copy()

    @cached_property
    def engine(self) -> LocalEngine:
        return LocalEngine(self.policy.model)

    @cached_property
    def all_heads(self) -> RewardModel:
        """One model with R heads."""
        return self._reward_model(HEADS)

    @cached_property
    def one_head_each(self) -> list[RewardModel]:
        """R models of one head, which score as that one does."""
        return [self._reward_model((name,)) for name in HEADS]

    def _reward_model(self, names: tuple[str, ...]) -> RewardModel:
        layout = Layout(heads=tuple(Head(name=name) for name in names))
        model = RewardModel.from_config(
            self.scale.shape.config(self.tokenizer), self.tokenizer, layout
        ).eval()
        rows = torch.randn(len(HEADS), self.scale.shape.hidden, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            score: Any = model.model.score
            score.weight.copy_(rows[[HEADS.index(name) for name in names]])
        return model

    def encoded(self, *, share: bool) -> Encoded:
        """What the reward model reads: prompts once a group, or once a completion."""
        made = self.made
        if share:
            return Encoded(prompt_ids=made.prompts, completion_ids=made.completions, prompt_of=made.prompt_of)
        own = [made.prompts[p] for p in made.prompt_of]
        return Encoded(prompt_ids=own, completion_ids=made.completions, prompt_of=list(range(len(own))))
