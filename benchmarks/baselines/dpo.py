"""DPO: pairs of completions ranked by the reward model, the better one made likelier than the worse (arXiv 2305.18290).

Offline, all pairs are sampled from the policy that the run begins with; online (`online`), each round samples from the
policy as it has become (arXiv 2402.04792, with a reward model in place of the judge there). The reference is the policy
that the run begins with; its log-probs are looked up once a pair.

Letters: B pairs of an optimizer step, S = 2·B sequences, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from grpo_kernels import linear_logprob
from torch import Tensor

from benchmarks.cost import flops
from benchmarks.cost.lab import Lab, Reference, Sequences
from grpo_fast.data.queue import PromptQueue
from grpo_fast.errors import UserError
from grpo_fast.packing import PackedBatch


@dataclass(frozen=True, kw_only=True)
class DPO:
    """What can be chosen; sampling and optimizer are those of the run's settings."""

    lr_scale: float = 1.0
    """Learning rate, in times the run's `optim.lr`"""
    beta: float = 0.1
    """How dear it is to leave the reference: the margin's weight in the loss"""
    online: bool = False
    """Sample new pairs from the policy as it has become, every round"""
    batches: int = 16
    """Completions of a round (offline: of the only one), in times those of a step of GRPO"""
    samples: int = 4
    """Completions of each prompt; the best and the worst make a pair"""
    epochs: int = 1
    """Online: passes over the pairs of a round"""
    standardize: bool = True
    """Divide each objective by its standard deviation in the round before they are added up"""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Completion 2·i is better than completion 2·i + 1, and both answer the same prompt."""

    sequences: Sequences
    ref_logprobs: list[Tensor]

    def __len__(self) -> int:
        return len(self.sequences.completions) // 2


def train(lab: Lab, settings: DPO) -> None:
    """Train the lab's policy until its ledger says that the budget is used up."""
    policy, ledger = lab.policy, lab.ledger
    reference = Reference(lab)
    lr = settings.lr_scale * lab.config.optim.lr
    optimizer = lab.optimizer(policy.trainable_parameters(), lr)
    queue = PromptQueue(len(lab.task.prompts), lab.config.seed)
    ledger.holds(
        optimizer,
        policy=[policy],
        reference=reference.modules,
        reward_model=lab.reward_models,
    )
    pairs: Pairs | None = None
    left: list[list[int]] = []
    rounds = 0
    for step in ledger.steps():
        if not left:
            if pairs is None or settings.online:
                pairs = new_pairs(lab, settings, queue, reference, step)
            if not settings.online:
                ledger.exhausted("generated_tokens")
            left = list(orders(len(pairs), settings, per_step(lab, settings), lab.seed(rounds)))
            rounds += 1
        assert pairs is not None
        with ledger.phase("update"):
            loss, batches = add_up_gradients(lab, settings, pairs, left.pop(0))
            norm, _ = optimizer.step(lab.warmed_up(lr, step))
        ledger.count(
            "update",
            flops.training(lab.size, batches, logprob_loss=True),
            training=True,
            trained_tokens=sum(len(batch.targets) for batch in batches),
        )
        ledger.took(loss, norm)


def per_step(lab: Lab, settings: DPO) -> int:
    """Pairs of an optimizer step: those of as many completions as a step of GRPO has."""
    return max(1, lab.sequences_per_step // settings.samples)


def new_pairs(lab: Lab, settings: DPO, queue: PromptQueue, reference: Reference, step: int) -> Pairs:
    """Sample, score and rank a round's completions; a prompt whose completions all score alike gives no pair.

    UserError where not one of a round does.
    """
    parts = []
    for batch in range(settings.batches):
        indices = queue.take(per_step(lab, settings))
        prompts = [lab.task.prompts[index] for index in indices]
        parts.append(lab.sample(prompts, settings.samples, step, draw=step * settings.batches + batch))
    with lab.ledger.phase("reward"):
        ranked = best_and_worst(lab, joined(parts), settings)
    if not ranked.completions:
        raise UserError(
            f"no pair: of {settings.batches * per_step(lab, settings)} prompts each has {settings.samples} completions "
            "that score alike; take a reward that tells completions apart, or more of them"
        )
    with lab.ledger.phase("reference"):
        ref_logprobs = reference.of(ranked.packed(lab))
    return Pairs(sequences=ranked, ref_logprobs=ref_logprobs)


def best_and_worst(lab: Lab, sampled: Sequences, settings: DPO) -> Sequences:
    """Of every prompt the completion with the highest score, then the one with the lowest."""
    chosen: list[int] = []
    scores = lab.scalar(sampled.rewards, standardize=settings.standardize).view(-1, settings.samples)
    for prompt, row in enumerate(scores):
        better, worse = int(row.argmax()), int(row.argmin())
        if row[better] > row[worse]:
            chosen += [prompt * settings.samples + better, prompt * settings.samples + worse]
    return Sequences(
        prompts=sampled.prompts,
        prompt_of=[sampled.prompt_of[i] for i in chosen],
        completions=[sampled.completions[i] for i in chosen],
        rewards=sampled.rewards[chosen],
    )


def orders(pairs: int, settings: DPO, size: int, seed: int) -> Iterator[list[int]]:
    """Which `size` pairs each optimizer step has: all of them once an epoch, in an order of its own."""
    for epoch in range(settings.epochs if settings.online else 1):
        order = np.random.default_rng([seed, epoch]).permutation(pairs).tolist()
        for first in range(0, pairs, size):
            yield order[first : first + size]


def add_up_gradients(
    lab: Lab, settings: DPO, pairs: Pairs, chosen: list[int]
) -> tuple[float, list[PackedBatch]]:
    """Forward and backward passes of one optimizer step: the loss, a mean over its B pairs, and its micro-batches."""
    total = 0.0
    rows = [row for pair in chosen for row in (2 * pair, 2 * pair + 1)]
    pair_of = [row // 2 for row in range(len(pairs.sequences.completions))]
    batches = pairs.sequences.packed(lab, rows, together=pair_of)
    lab.policy.train()
    for batch in batches:
        loss = dpo_loss(lab, batch, batch.gather(pairs.ref_logprobs), settings.beta) / len(chosen)
        loss.backward()
        total += loss.item()
    return total, batches


def dpo_loss(lab: Lab, batch: PackedBatch, ref_logprobs: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta · ((logp - ref) of the better - that of the worse)), summed over the pairs of a micro-batch."""
    logprobs, _ = linear_logprob(
        lab.policy.hidden_states(batch),
        targets=batch.targets,
        temperature=lab.config.rollout.temperature,
        backend=lab.config.policy.backend,
        **lab.policy.head(),
    )
    gains = torch.segment_reduce(logprobs - ref_logprobs, "sum", lengths=batch.cu_seqlens.diff().long())
    signs = 1.0 - 2.0 * (batch.sequence_index % 2)  # the better one of a pair stands first
    _, place = torch.unique(batch.sequence_index // 2, return_inverse=True)
    margins = gains.new_zeros(len(gains) // 2).index_add(0, place, signs * gains)
    return -F.logsigmoid(beta * margins).sum()


def joined(parts: list[Sequences]) -> Sequences:
    """The sequences of several calls, one after the other."""
    prompt_of: list[int] = []
    prompts = 0
    for part in parts:
        prompt_of += [prompts + p for p in part.prompt_of]
        prompts += len(part.prompts)
    return Sequences(
        prompts=[prompt for part in parts for prompt in part.prompts],
        prompt_of=prompt_of,
        completions=[completion for part in parts for completion in part.completions],
        rewards=torch.cat([part.rewards for part in parts]),
    )
