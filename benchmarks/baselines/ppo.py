"""PPO as RLHF uses it: one completion a prompt, a value model, generalised advantages, a KL penalty in the reward.

arXiv 1707.06347 (PPO), 1506.02438 (GAE), 2203.02155 (its use for language models). The value model is a network of its
own, or a linear head on the policy's hidden states (`shared`).

Letters: S sequences, N completion tokens of all of them, T tokens of the longest, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from grpo_kernels import LossConfig, linear_grpo_loss
from torch import Tensor, nn

from benchmarks.cost import flops
from benchmarks.cost.architecture import Architecture
from benchmarks.cost.lab import Lab, Reference, Sequences, by_sequence
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.queue import PromptQueue
from grpo_fast.errors import UserError
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.self_check import hidden_states
from grpo_fast.packing import PackedBatch
from grpo_fast.task import lora_settings

VALUE = Layout(heads=(Head(name="value"),))


@dataclass(frozen=True, kw_only=True)
class PPO:
    """What can be chosen; the sequences of a step, the sampling and the optimizer are those of the run's settings."""

    lr_scale: float = 1.0
    """Learning rate of the policy, in times the run's `optim.lr`"""
    value_lr_scale: float = 4.0
    """Learning rate of a value network of its own, in times the run's `optim.lr`"""
    epochs: int = 2
    """Passes over each batch of completions"""
    minibatches: int = 2
    """Optimizer steps in each pass"""
    kl_coef: float = 0.02
    """Weight of the KL penalty, taken off each token's reward"""
    standardize: bool = True
    """Divide each objective by its standard deviation in the batch before they are added up"""
    gamma: float = 1.0
    """Discount of later rewards"""
    lam: float = 0.95
    """GAE's trade between the value model's bias (0) and the returns' variance (1)"""
    clip: float = 0.2
    """The probability ratio is clipped to 1 ± this"""
    value_clip: float = 0.2
    """The new value is clipped to the old one ± this many standard deviations of the returns; 0: not"""
    value_coef: float = 0.5
    """Weight of the value loss, where the trunk is shared"""
    shared: bool = False
    """Whether the value model is a head on the policy's trunk"""
    value_from: Literal["policy", "reward_model"] = "policy"
    """What a value network of its own begins as"""


class ValueNetwork(nn.Module):
    """A decoder of its own with one output a token; where the policy is an adapter on a model, so is this."""

    def __init__(self, model: RewardModel, config: TrainConfig) -> None:
        """`model` has one output, which is set to 0 everywhere."""
        super().__init__()
        self.model = model.train()
        self.size = Architecture.of(
            model.model.config,
            lora_settings(config),
            heads=1,
            checkpointing=config.policy.gradient_checkpointing,
        )
        for name, weight in model.named_parameters():
            if ".score." in name:
                nn.init.zeros_(weight)

    @classmethod
    def of(cls, lab: Lab, settings: PPO) -> ValueNetwork:
        """A copy of the start policy, or of the first reward model, with an output of its own."""
        source = str(lab.start)
        if settings.value_from == "reward_model":
            if not lab.reward_models:
                raise UserError("value_from reward_model: the rewards come from no model; take policy")
            model = lab.reward_models[0]
            if model.tokenizer.get_vocab() != lab.policy.tokenizer.get_vocab():
                raise UserError("value_from reward_model: its tokenizer is not the policy's; take policy")
            source = str(model.model.config.name_or_path)
        return cls(
            RewardModel.from_backbone(
                source,
                VALUE,
                seed=lab.config.seed,
                dtype=lab.policy.model.dtype,
                device=lab.policy.device,
                lora=lora_settings(lab.config),
                gradient_checkpointing=lab.config.policy.gradient_checkpointing,
            ),
            lab.config,
        )

    def forward(self, batch: PackedBatch) -> Tensor:
        """(N,) float32: the value of the state each token was drawn in."""
        states = hidden_states(self.model.model, batch, packed=self.model.packed)
        return self.model.outputs(states.index_select(0, batch.hidden_index)).squeeze(1)


class ValueHead(nn.Module):
    """A linear output on the policy's hidden states; float32, at first 0 everywhere."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.score = nn.Linear(lab.policy.head()["weight"].shape[1], 1, device=lab.policy.device)
        nn.init.zeros_(self.score.weight)

    def forward(self, states: Tensor) -> Tensor:
        """(N,) float32 from the hidden states (N, H)."""
        return self.score(states.float()).squeeze(1)


def train(lab: Lab, settings: PPO, value: ValueNetwork | ValueHead | None = None) -> None:
    """Train the lab's policy, and a value model beside it, until its ledger says that the budget is used up.

    `value` None: one is made as the settings say.
    """
    task, policy, ledger = lab.task, lab.policy, lab.ledger
    reference = Reference(lab)
    value = value or (ValueHead(lab) if settings.shared else ValueNetwork.of(lab, settings))
    own, lr = list(value.parameters()), settings.lr_scale * lab.config.optim.lr
    if settings.shared:
        rates = [lr]
        optimizers = [lab.optimizer([*policy.trainable_parameters(), *own], lr)]
    else:
        rates = [lr, settings.value_lr_scale * lab.config.optim.lr]
        optimizers = [
            lab.optimizer(parameters, rate)
            for parameters, rate in zip((policy.trainable_parameters(), own), rates, strict=True)
        ]
    queue = PromptQueue(len(task.prompts), lab.config.seed)
    ledger.holds(
        *optimizers,
        policy=[policy],
        reference=reference.modules,
        value_model=[value],
        reward_model=lab.reward_models,
    )
    for step in ledger.steps():
        # one completion each of as many prompts as a step of GRPO has completions
        prompts = [task.prompts[index] for index in queue.take(lab.sequences_per_step)]
        sequences = lab.sample(prompts, 1, step)
        with ledger.phase("reference"):
            whole = sequences.packed(lab)  # every look-up reads the same batches
            ref_logprobs = reference.of(whole)
        with ledger.phase("values"):
            old_values = look_up_values(lab, value, whole)
        with ledger.phase("update"):
            old_logprobs = look_up_logprobs(lab, whole)
            scores = lab.scalar(sequences.rewards, standardize=settings.standardize)
            rewards = token_rewards(scores, old_logprobs, ref_logprobs, settings.kl_coef)
            advantages, returns = generalised_advantages(
                rewards, old_values, gamma=settings.gamma, lam=settings.lam
            )
            spread = torch.cat(returns).std().item()
            known = {
                "old_logprobs": old_logprobs,
                "old_values": old_values,
                "advantages": whitened(advantages),
                "returns": returns,
            }
            losses, norms, done = [], [], []
            for batches in minibatches(lab, sequences, settings, step):
                losses.append(
                    add_up_gradients(lab, settings, value, batches, known, spread * settings.value_clip)
                )
                done.append(batches)
                for optimizer, rate in zip(optimizers, rates, strict=True):
                    norms.append(optimizer.step(lab.warmed_up(rate, step))[0])
        count(lab, value, whole, done)
        ledger.took(sum(losses), *norms)


def add_up_gradients(
    lab: Lab,
    settings: PPO,
    value: nn.Module,
    batches: list[PackedBatch],
    known: dict[str, list[Tensor]],
    value_clip: float,
) -> float:
    """Forward and backward passes of one optimizer step; the loss, a mean over the step's tokens.

    `value_clip` is in the returns' unit.
    """
    policy, total = lab.policy, 0.0
    tokens = sum(len(batch.targets) for batch in batches)
    loss_config = LossConfig(
        surrogate="clip",
        clip_low=settings.clip,
        clip_high=settings.clip,
        kl_coef=0.0,
        aggregation="token_mean",
    )
    policy.train()
    for batch in batches:
        of = {name: batch.gather(values) for name, values in known.items()}
        states = policy.hidden_states(batch)
        loss, _ = linear_grpo_loss(
            states,
            targets=batch.targets,
            advantages=of["advantages"],
            config=loss_config,
            old_logprobs=of["old_logprobs"],
            cu_seqlens=batch.cu_seqlens,
            normalizer=tokens,
            temperature=lab.config.rollout.temperature,
            backend=lab.config.policy.backend,
            **policy.head(),
        )
        if settings.shared:
            values = value(states)
            loss = loss + settings.value_coef * value_loss(values, of, value_clip) / tokens
            loss.backward()
        else:
            loss.backward()
            errors = value_loss(value(batch), of, value_clip) / tokens
            errors.backward()
            loss = loss + errors
        total += loss.item()
    return total


def value_loss(values: Tensor, known: dict[str, Tensor], clip: float) -> Tensor:
    """Half the squared error against the returns, summed over tokens; of the clipped value where that is larger."""
    errors = (values - known["returns"]).square()
    if clip:
        near = known["old_values"] + (values - known["old_values"]).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - known["returns"]).square())
    return 0.5 * errors.sum()


def token_rewards(
    scores: Tensor,  # (S,)
    old_logprobs: list[Tensor],
    ref_logprobs: list[Tensor],
    kl_coef: float,
) -> list[Tensor]:
    """Each token's reward: the KL penalty, and at the last one the completion's score too."""
    rewards = []
    for score, old, ref in zip(scores.tolist(), old_logprobs, ref_logprobs, strict=True):
        penalty = -kl_coef * (old - ref)
        penalty[-1] += score
        rewards.append(penalty)
    return rewards


def generalised_advantages(
    rewards: list[Tensor], values: list[Tensor], *, gamma: float, lam: float
) -> tuple[list[Tensor], list[Tensor]]:
    """GAE (arXiv 1506.02438): advantages of every token, and returns, their sum with the values.

    delta_t = r_t + gamma · v_{t+1} - v_t;  A_t = delta_t + gamma · lam · A_{t+1}; after the last token both are 0.
    """
    lengths = [len(r) for r in rewards]
    r = nn.utils.rnn.pad_sequence(rewards, batch_first=True)  # (S, T); behind the end all is 0
    v = nn.utils.rnn.pad_sequence(values, batch_first=True)
    after = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], dim=1)
    delta = r + gamma * after - v
    advantages = torch.zeros_like(delta)
    carried = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        carried = delta[:, t] + gamma * lam * carried
        advantages[:, t] = carried
    returns = advantages + v
    return (
        [row[:n] for row, n in zip(advantages, lengths, strict=True)],
        [row[:n] for row, n in zip(returns, lengths, strict=True)],
    )


def whitened(per_sequence: list[Tensor]) -> list[Tensor]:
    """Mean 0 and standard deviation 1 over all tokens."""
    together = torch.cat(per_sequence)
    together = (together - together.mean()) / (together.std() + 1e-8)
    return list(together.split([len(part) for part in per_sequence]))


def look_up_logprobs(lab: Lab, batches: list[PackedBatch]) -> list[Tensor]:
    """Log-probs of every token by the policy before the update."""
    temperature = lab.config.rollout.temperature
    return by_sequence(batches, lambda batch: lab.policy.logprobs(batch, temperature=temperature)[0])


@torch.no_grad()
def look_up_values(lab: Lab, value: nn.Module, batches: list[PackedBatch]) -> list[Tensor]:
    """The value model's view of every token before the update."""
    if isinstance(value, ValueHead):
        return by_sequence(batches, lambda batch: value(lab.policy.hidden_states(batch)))
    return by_sequence(batches, value)


def minibatches(lab: Lab, sequences: Sequences, settings: PPO, step: int) -> Iterator[list[PackedBatch]]:
    """The micro-batches of every optimizer step: all sequences once an epoch, in an order of its own."""
    count = len(sequences.completions)
    for epoch in range(settings.epochs):
        order = np.random.default_rng([lab.seed(step), epoch]).permutation(count).tolist()
        for part in range(settings.minibatches):
            low, high = count * part // settings.minibatches, count * (part + 1) // settings.minibatches
            yield sequences.packed(lab, order[low:high])


def count(
    lab: Lab, value: ValueNetwork | ValueHead, whole: list[PackedBatch], done: list[list[PackedBatch]]
) -> None:
    """Enter what a step has taken beside sampling, scoring and the reference: look-ups, then optimizer steps."""
    ledger = lab.ledger
    ledger.count("update", flops.logprobs(lab.size, whole))
    if isinstance(value, ValueHead):
        ledger.count("values", sum(flops.body_forward(lab.size, batch) for batch in whole))
    else:
        ledger.count("values", flops.scoring(value.size, whole))
    for step in done:
        work = flops.training(lab.size, step)
        if isinstance(value, ValueNetwork):
            work += flops.scoring(value.size, step, backward=True)
        tokens = sum(len(batch.targets) for batch in step)
        ledger.count("update", work, training=True, trained_tokens=tokens)
