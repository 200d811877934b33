"""Training a reward model on rated replies and comparisons: the data of a step, and one update.

Letters: E examples (a prompt with its replies), S replies, M comparisons, R heads, K members of the ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from grpo_fast.config.reward_settings import RewardLossSettings
from grpo_fast.data.ratings import RatedExample
from grpo_fast.errors import UserError
from grpo_fast.models.reward_backbone import length_limit
from grpo_fast.models.reward_data import label_matrix
from grpo_fast.models.reward_loss import Targets, head_losses, weighted
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_text import Encoded, encode_examples
from grpo_fast.optim.optimizer import Optimizer, learning_rate

WINDOW_BATCHES = 16  # batches are cut from windows of this many, sorted by length


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Rated examples as a model reads them."""

    encoded: Encoded
    example_of: list[int]
    """(S) each reply's example"""
    first: list[int]
    """(E+1) where each example's replies begin"""
    labels: Tensor
    """(S, R) float32, NaN where one is missing"""
    weights: Tensor
    """(S, K) float32: how often each member of an ensemble sees the reply"""
    comparisons: list[list[tuple[int, int, int, float]]]
    """(E) each example's comparisons: head, better and worse reply (in S), margin"""

    @classmethod
    def of(
        cls,
        model: RewardModel,
        examples: Sequence[RatedExample],
        *,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> TrainingSet:
        """Encode `examples` for `model`.

        Margins are divided by the head's mean, so that they average to a lead of 1 in log-odds whatever their unit.
        UserError where nothing has a label or a reply is longer than `max_tokens`.
        """
        labels = label_matrix([row for e in examples for row in e.labels], model.head_names)
        if bool(labels.isnan().all()) and not any(e.comparisons for e in examples):
            raise UserError(f"ratings: none of {len(labels)} replies has a label; nothing to train on")
        limit = length_limit(model.model.config, max_tokens)
        encoded = encode_examples(model.tokenizer, examples, max_tokens=limit)
        first = list(accumulate((len(e.replies) for e in examples), initial=0))
        head = {name: r for r, name in enumerate(model.head_names)}
        margins: dict[str, list[float]] = {}
        for comparison in (c for e in examples for c in e.comparisons if c.margin):
            margins.setdefault(comparison.head, []).append(comparison.margin)
        unit = {name: sum(found) / len(found) for name, found in margins.items()}
        members = model.layout.members
        drawn = torch.Generator().manual_seed(seed)
        weights = torch.poisson(
            torch.ones(len(examples), members), generator=drawn
        )  # a bootstrap of examples
        example_of = [index for index, e in enumerate(examples) for _ in e.replies]
        return cls(
            encoded=encoded,
            example_of=example_of,
            first=first,
            labels=labels,
            weights=(torch.ones_like(weights) if members == 1 else weights)[example_of],
            comparisons=[
                [
                    (head[c.head], start + c.better, start + c.worse, c.margin / unit.get(c.head, 1.0))
                    for c in e.comparisons
                ]
                for start, e in zip(first, examples, strict=False)
            ],
        )

    def lengths(self) -> list[int]:
        """(E) tokens of each example, its prompt counted once."""
        ids, prompts = self.encoded.completion_ids, self.encoded.prompt_ids
        total = [0] * len(self.comparisons)
        for i, example in enumerate(self.example_of):
            total[example] += len(ids[i])
            if i == self.first[example]:
                total[example] += len(prompts[self.encoded.prompt_of[i]])
        return total

    def batch(self, chosen: Sequence[int]) -> tuple[Encoded, Targets, list[int]]:
        """Replies and targets of the examples `chosen`, and the example (its place in `chosen`) of each reply."""
        rows = [row for e in chosen for row in range(self.first[e], self.first[e + 1])]
        place = {row: i for i, row in enumerate(rows)}
        index: dict[int, int] = {}
        owner = [index.setdefault(self.encoded.prompt_of[row], len(index)) for row in rows]
        found = [
            (head, place[better], place[worse], margin)
            for e in chosen
            for head, better, worse, margin in self.comparisons[e]
        ]
        encoded = Encoded(
            prompt_ids=[self.encoded.prompt_ids[p] for p in index],
            completion_ids=[self.encoded.completion_ids[row] for row in rows],
            prompt_of=owner,
        )
        targets = Targets.of_step(
            self.labels[rows],
            self.weights[rows],
            torch.tensor([c[:3] for c in found], dtype=torch.int64).reshape(-1, 3),
            torch.tensor([c[3] for c in found], dtype=torch.float32),
        )
        return (
            encoded,
            targets,
            [k for k, e in enumerate(chosen) for _ in range(self.first[e], self.first[e + 1])],
        )


def update(
    model: RewardModel,
    optimizer: Optimizer,
    data: TrainingSet,
    chosen: Sequence[int],
    settings: RewardLossSettings,
    *,
    lr: float,
    token_budget: int,
) -> dict[str, float]:
    """One optimizer step on the examples `chosen`, and its metrics.

    The step runs in as many micro-batches as `token_budget` packed positions ask for; the split does not change the
    gradient. bfloat16 weights are trained through float32 copies; with float32 weights on CUDA the matrix products
    run in bfloat16.
    """
    device, layout = model.device, model.layout
    encoded, targets, bundle = data.batch(chosen)
    targets = targets.to(device)
    weights = torch.tensor([settings.weights.get(name, 1.0) for name in model.head_names], device=device)
    half = device.type == "cuda" and model.model.dtype == torch.float32
    by_head = torch.zeros(len(layout.heads), device=device)
    loss = torch.zeros((), device=device)
    tokens = 0
    model.train()
    for batch in model.pack(encoded, token_budget, bundle if len(targets.comparisons) else None):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            outputs = model(batch)
        part = targets.of_batch(batch.sequence_index)
        losses = head_losses(*layout.split(outputs), list(model.cuts), part, layout, settings)
        share = weighted(losses, part, weights, model.log_noise if model.log_noise.requires_grad else None)
        share.backward()
        loss += share.detach()
        by_head += losses.detach().mean(dim=0)
        tokens += batch.input_ids.shape[1]
    norm, taken = optimizer.step(lr)
    metrics = {"loss": loss.item(), "lr": lr, "grad_norm": norm, "trained_tokens": float(tokens)}
    metrics |= {f"loss/{name}": value for name, value in zip(model.head_names, by_head.tolist(), strict=True)}
    return metrics | ({} if taken else {"skipped_updates": 1.0})


def example_batches(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Examples of each step: shuffled, sorted by length inside windows, then the batches shuffled again."""
    generator = np.random.default_rng(seed)
    size = np.asarray(lengths)
    done = 0
    while done < steps:
        order = generator.permutation(len(size))
        window = batch_size * WINDOW_BATCHES
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(size[part], kind="stable")] for part in parts])
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for k in generator.permutation(len(batches))[: steps - done]:
            yield batches[k].tolist()
            done += 1


def steps_of(examples: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of so many passes over the examples, at least one."""
    return max(1, round(epochs * math.ceil(examples / batch_size)))


def make_optimizer(model: RewardModel, settings: RewardLossSettings, **options: object) -> Optimizer:
    """The optimizer of whatever of `model` is trained, the learned loss weights among it where they are asked for."""
    model.log_noise.requires_grad_(settings.uncertainty_weighting)
    return Optimizer(model.trainable_parameters(), **options)  # pyright: ignore[reportArgumentType]


def fit(
    model: RewardModel,
    examples: Sequence[RatedExample],
    *,
    epochs: float = 1.0,
    batch_size: int = 64,
    lr: float = 1e-3,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    token_budget: int = 8192,
    max_tokens: int | None = None,
    seed: int = 0,
    loss: RewardLossSettings | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
) -> list[float]:
    """Train `model` in place; returns the loss of every step.

    A step takes `batch_size` examples of similar length. AdamW, linear warm-up over the share `warmup` of the steps,
    then cosine to zero. `on_step(step, steps, metrics)` is called after each step, counted from 1. The same seed
    gives the same weights. Raises UserError for labels that do not fit the heads and for a loss that is no longer
    finite.
    """
    settings = loss or RewardLossSettings()
    data = TrainingSet.of(model, examples, max_tokens=max_tokens, seed=seed)
    total = steps_of(len(examples), batch_size, epochs)
    optimizer = make_optimizer(model, settings, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    losses: list[float] = []
    for step, chosen in enumerate(example_batches(data.lengths(), batch_size, total, seed)):
        rate = learning_rate(
            step, lr=lr, warmup_steps=round(warmup * total), total_steps=total, schedule="cosine"
        )
        metrics = update(model, optimizer, data, chosen, settings, lr=rate, token_budget=token_budget)
        losses.append(finite_loss(metrics["loss"], step + 1, lr))
        if on_step is not None:
            on_step(step + 1, total, metrics)
    model.eval()
    return losses


def finite_loss(loss: float, step: int, lr: float) -> float:
    """`loss` itself; UserError when it is no longer a number."""
    if not math.isfinite(loss):
        raise UserError(f"reward model: the loss is {loss} at step {step}; use a smaller lr than {lr}")
    return loss
