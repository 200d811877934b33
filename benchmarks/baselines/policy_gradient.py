"""GRPO, RLOO and REINFORCE++: the trainer's own rollout and update, with the presets as they are.

A group of completions for each prompt is compared with itself, so there is no value model (arXiv 2402.03300,
2402.14740, 2501.03262). What `grpo_fast.train` does around it, files, display and resuming, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

from benchmarks.cost import flops
from benchmarks.cost.lab import Lab, Reference
from grpo_fast.config.resolve import loss_config
from grpo_fast.config.settings import Preset, TrainConfig
from grpo_fast.data.queue import PromptQueue
from grpo_fast.grpo import packed, split_by_prompt, update, with_signal
from grpo_fast.models.policy import Policy
from grpo_fast.rollout import Rollout, collect


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """What can be chosen; everything else is as in the run's settings."""

    lr_scale: float = 1.0
    """Learning rate, in times the run's `optim.lr`"""
    minibatches: int = 1
    """Optimizer steps on each batch of completions"""
    preset: Preset = "grpo"
    """Loss and, where it has its own, advantage"""
    mode: Literal["auto", "scalarized", "gdpo"] = "auto"
    """How several rewards become one advantage"""
    kl_coef: float | None = None
    """Weight of the KL term; None: the preset's"""

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The settings of a training run with these choices."""
        return replace(
            config,
            loss=replace(config.loss, preset=self.preset, kl_coef=self.kl_coef),
            advantage=replace(config.advantage, mode=self.mode),
            optim=replace(config.optim, lr=self.lr_scale * config.optim.lr, minibatches=self.minibatches),
        )


def train(lab: Lab, settings: PolicyGradient) -> None:
    """Train the lab's policy until its ledger says that the budget is used up."""
    config, task, policy, ledger = settings.applied(lab.config), lab.task, lab.policy, lab.ledger
    reference = Reference(lab) if loss_config(config).kl_coef != 0 else None
    optimizer = lab.optimizer(policy.trainable_parameters(), config.optim.lr)
    queue = PromptQueue(len(task.prompts), config.seed)
    ledger.holds(
        optimizer,
        policy=[policy],
        reference=reference.modules if reference else [],
        reward_model=lab.reward_models,
    )
    for step in ledger.steps():
        prompts = [task.prompts[index] for index in queue.take(config.rollout.prompts_per_step)]
        with ledger.phase("generate"):
            lab.engine.push(policy.named_weights(), step)
        # a group of completions for each prompt, their rewards, and each one's advantage over its group
        with ledger.phase("reward"):
            rollout = collect(
                prompts,
                task,
                lab.engine,
                config,
                weights=task.scorer.weights,
                seed=lab.seed(step),
                timer=ledger.phase,
            )
        # push the policy towards what scored better, and hold it near the reference
        with ledger.phase("update"):
            metrics = update(
                policy,
                optimizer,
                rollout,
                config,
                lr=lab.warmed_up(config.optim.lr, step),
                reference=cast(Policy, reference),
            )
        count(lab, rollout, config)
        ledger.took(metrics["loss"], metrics["grad_norm"])


def count(lab: Lab, rollout: Rollout, config: TrainConfig) -> None:
    """Enter what the step has taken; the reference enters its own look-ups."""
    lab.count_rollout(rollout.prompts, rollout.prompt_of, rollout.completions, rollout.texts)
    loss, optim = loss_config(config), config.optim
    for sequences in split_by_prompt(rollout, optim.minibatches):
        kept = with_signal(rollout, sequences, loss, mask_truncated=config.loss.mask_truncated)
        batches = packed(rollout, kept, lab.policy, optim.token_budget)
        tokens = sum(len(batch.targets) for batch in batches)
        for _ in range(optim.updates_per_rollout):
            lab.ledger.count(
                "update", flops.training(lab.size, batches), training=True, trained_tokens=tokens
            )
        if optim.updates_per_rollout * optim.minibatches > 1:  # the old policy's log-probs
            lab.ledger.count("update", flops.logprobs(lab.size, batches))
