"""What every algorithm is given: the same models, prompts, rewards, engine and clock, and no judge.

Letters: P prompts, n completions of each, S = P·n sequences, N completion tokens, R objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cost import flops
from benchmarks.cost.architecture import Architecture
from benchmarks.cost.ledger import Ledger
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.base import Completion, RolloutEngine
from grpo_fast.models.policy import Policy
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.optim.optimizer import Optimizer, learning_rate
from grpo_fast.packing import PackedBatch, pack_chosen
from grpo_fast.task import Task, lora_settings


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Completions with what they were asked and how they were scored."""

    prompts: list[Prompt]  # (P)
    prompt_of: list[int]  # (S) index into prompts
    completions: list[Completion]  # (S)
    rewards: Tensor  # (S, R) float32, NaN where missing

    @property
    def token_ids(self) -> list[list[int]]:
        return [completion.token_ids for completion in self.completions]

    def packed(
        self, lab: Lab, chosen: Sequence[int] | None = None, together: Sequence[int] | None = None
    ) -> list[PackedBatch]:
        """Micro-batches of the completions `chosen` (None: all); `sequence_index` counts among all of them."""
        batches = pack_chosen(
            [prompt.token_ids for prompt in self.prompts],
            self.token_ids,
            range(len(self.completions)) if chosen is None else chosen,
            prompt_of=self.prompt_of,
            token_budget=lab.config.optim.token_budget,
            share_prefix=lab.policy.packed,
            together=together,
        )
        return [batch.to(lab.policy.device) for batch in batches]


@dataclass(frozen=True, kw_only=True)
class Lab:
    """One run's place of work."""

    config: TrainConfig
    task: Task
    """Its `judge` is None: no algorithm sees it"""
    engine: RolloutEngine
    ledger: Ledger
    start: Path
    """Folder of the policy that every run begins with"""

    size: Architecture
    """The policy's, for counting"""
    frozen_size: Architecture
    """The reference's: the policy without adapters"""
    reward_sizes: list[Architecture]

    @classmethod
    def of(
        cls, config: TrainConfig, task: Task, engine: RolloutEngine, ledger: Ledger, *, start: Path
    ) -> Lab:
        """A lab for this task, its judge taken away.

        Completions are scored after they have all been generated, whatever the device: a phase is a phase.
        """
        config = replace(config, reward=replace(config.reward, overlap="off"))
        model, checkpointing = task.policy.model.config, config.policy.gradient_checkpointing
        return cls(
            config=config,
            task=replace(task, judge=None),
            engine=engine,
            ledger=ledger,
            start=start,
            size=Architecture.of(model, lora_settings(config), checkpointing=checkpointing),
            frozen_size=Architecture.of(model),
            reward_sizes=[
                Architecture.of(reward.model.config, heads=len(reward.layout.names))
                for reward in reward_models(task)
            ],
        )

    @property
    def policy(self) -> Policy:
        return self.task.policy

    @property
    def reward_models(self) -> list[RewardModel]:
        """Every reward model that scores completions."""
        return reward_models(self.task)

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """The run's optimizer with another learning rate."""
        settings = self.config.optim
        return Optimizer(
            parameters,
            lr=lr,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
            max_grad_norm=settings.max_grad_norm,
            kind=settings.optimizer,
            where=self.config.memory.optimizer,
        )

    def warmed_up(self, lr: float, step: int) -> float:
        """The learning rate of a step: up from 0 over the run's warm-up, then constant."""
        warmup = self.config.optim.warmup_steps
        return learning_rate(step, lr=lr, warmup_steps=warmup, total_steps=0, schedule="constant")

    def seed(self, step: int) -> int:
        """Where the sampling of a step begins, as in training."""
        return (self.config.seed << 32) + step + 1

    @property
    def sequences_per_step(self) -> int:
        """Completions of one of GRPO's steps, which the others' amounts follow."""
        return self.config.rollout.prompts_per_step * self.config.rollout.group_size

    def sample(self, prompts: list[Prompt], n: int, step: int, *, draw: int | None = None) -> Sequences:
        """`n` completions of each prompt by the policy as it is in this step, scored on every objective.

        `draw` (None: the step) says which random numbers, where a step samples several times.
        """
        task, ledger = self.task, self.ledger
        with ledger.phase("generate"):
            self.engine.push(self.policy.named_weights(), step)
            completions = self.engine.generate(
                [prompt.token_ids for prompt in prompts],
                n,
                task.sampling,
                self.seed(step if draw is None else draw),
            )
            texts = [task.decode(completion.token_ids) for completion in completions]
        prompt_of = [index for index in range(len(prompts)) for _ in range(n)]
        with ledger.phase("reward"):
            lengths = [len(completion.token_ids) for completion in completions]
            scored = task.scorer([prompts[p] for p in prompt_of], texts, lengths)
            rewards = task.scorer.used(scored)
        self.count_rollout(prompts, prompt_of, completions, texts)
        return Sequences(prompts=prompts, prompt_of=prompt_of, completions=completions, rewards=rewards)

    def count_rollout(
        self,
        prompts: list[Prompt],
        prompt_of: list[int],
        completions: list[Completion],
        texts: list[str],
    ) -> None:
        """Enter what generating and scoring a batch has taken."""
        lengths = [len(completion.token_ids) for completion in completions]
        work = flops.generation(
            self.size, [len(p.token_ids) for p in prompts], lengths, len(completions) // len(prompts)
        )
        self.ledger.count("generate", work, generated_tokens=sum(lengths))
        asked = [prompts[p].messages or prompts[p].text for p in prompt_of]
        for model, size in zip(self.reward_models, self.reward_sizes, strict=True):
            batches = model.pack(model.encode(asked, texts, skip_long=True), self.task.scorer.token_budget)
            self.ledger.count("reward", flops.scoring(size, batches))
        self.ledger.count("reward", reward_calls=len(completions))

    def scalar(self, rewards: Tensor, *, standardize: bool) -> Tensor:
        """(S,): the weighted sum of the objectives; of each over its standard deviation in the batch if asked.

        A missing reward counts as the mean of its objective.
        """
        means = rewards.nanmean(0, keepdim=True)
        centred = torch.where(rewards.isnan(), 0.0, rewards - means)
        if standardize:
            centred = centred / centred.square().mean(0, keepdim=True).sqrt().clamp(min=1e-6)
            means = torch.zeros_like(means)
        return ((centred + means.nan_to_num()) * self.task.scorer.weights).sum(1)


def reward_models(task: Task) -> list[RewardModel]:
    """Every reward model of a task."""
    models = task.scorer.models
    return [model for ensemble in models.ensembles for model in ensemble] if models else []


class Reference:
    """The policy a run begins with, which never changes: with LoRA the model under the adapter, else a copy.

    Stands in for the frozen policy of `grpo.update`; its look-ups are a phase of their own.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._model = None if lab.policy.is_lora else lab.policy.frozen_copy()

    @property
    def modules(self) -> list[nn.Module]:
        """What it keeps in memory."""
        return [self._model] if self._model is not None else []

    @torch.no_grad()
    def logprobs(
        self, batch: PackedBatch, *, temperature: float = 1.0, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-probs and entropies, as `Policy.logprobs`."""
        lab = self._lab
        with lab.ledger.phase("reference"):
            found = (self._model or lab.policy).logprobs(
                batch, temperature=temperature, reference=self._model is None
            )
        lab.ledger.count("reference", flops.logprobs(lab.frozen_size, [batch]))
        return found

    def of(self, batches: list[PackedBatch]) -> list[Tensor]:
        """Log-probs of every completion's tokens."""
        temperature = self._lab.config.rollout.temperature
        with self._lab.ledger.phase("reference"):
            return by_sequence(batches, lambda batch: self.logprobs(batch, temperature=temperature)[0])


def by_sequence(batches: list[PackedBatch], of: Callable[[PackedBatch], Tensor]) -> list[Tensor]:
    """What `of` says of a batch's tokens, (N,), as one tensor a sequence; the batches hold every sequence once."""
    found: dict[int, Tensor] = {}
    for batch in batches:
        parts = of(batch).split(batch.cu_seqlens.diff().tolist())
        found |= zip(batch.sequence_index.tolist(), parts, strict=True)
    return [found[index] for index in range(len(found))]
