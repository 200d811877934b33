"""Training a reward model on labelled replies, and measuring it on replies it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy import stats

from grpo_fast.errors import UserError
from grpo_fast.models.reward_data import LabelledReply, label_matrix
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.optim import Optimizer, learning_rate

WINDOW_BATCHES = 16  # batches are cut from windows of this many, sorted by length


def fit(
    model: RewardModel,
    examples: Sequence[LabelledReply],
    *,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    token_budget: int = 8192,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place on the observed labels; returns the loss of every step.

    One of `epochs` and `steps` is given. A step takes `batch_size` replies of similar length, in as many
    micro-batches as `token_budget` packed positions ask for; the split does not change the gradient. AdamW
    (fused where torch has it), linear warm-up over the share `warmup` of the steps, then cosine to zero.
    `on_step(step, steps, loss)` is called after each step, counted from 1. The same seed gives the same
    weights. bfloat16 weights are trained through float32 copies; with float32 weights on CUDA the matrix
    products run in bfloat16. Raises UserError for labels that do not fit the heads and for a loss that is
    no longer finite.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("give one of epochs and steps")
    labels = label_matrix(examples, model.head_names)
    if not len(examples) or bool(torch.isnan(labels).all()):
        raise UserError(f"labelled replies: none of {len(examples)} has a label; nothing to train on")
    prompt_ids, completion_ids, prompt_of = model.encode(
        [example.prompt for example in examples], [example.completion for example in examples]
    )
    lengths = [len(ids) + len(prompt_ids[p]) for ids, p in zip(completion_ids, prompt_of, strict=True)]
    per_epoch = math.ceil(len(examples) / batch_size)
    total = steps if steps is not None else max(1, round(cast(float, epochs) * per_epoch))
    device = model.model.device
    optimizer = Optimizer(model.parameters(), lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    half = device.type == "cuda" and model.model.dtype == torch.float32
    losses: list[float] = []
    model.train()
    for step, rows in enumerate(_batches(lengths, batch_size, total, seed), start=1):
        step_labels = labels[rows].to(device)
        counts = (~torch.isnan(step_labels)).sum(dim=0)
        index: dict[int, int] = {}
        owner = [index.setdefault(prompt_of[row], len(index)) for row in rows]
        batches = model.pack(
            [prompt_ids[p] for p in index], [completion_ids[r] for r in rows], owner, token_budget
        )
        loss = torch.zeros((), device=device)
        for batch in batches:
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                part = model.loss(batch, step_labels[batch.sequence_index], counts)
            part.backward()
            loss += part.detach()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"reward model: the loss is {losses[-1]} at step {step}; use a smaller lr than {lr}"
            )
        ramp = round(warmup * total)
        rate = learning_rate(step - 1, lr=lr, warmup_steps=ramp, total_steps=total, schedule="cosine")
        optimizer.step(rate)
        if on_step is not None:
            on_step(step, total, losses[-1])
    model.eval()
    return losses


def _batches(lengths: list[int], batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Rows of each step: shuffled, sorted by length inside windows, then the batches shuffled again."""
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


def held_out_report(
    model: RewardModel, examples: Sequence[LabelledReply], *, token_budget: int = 8192
) -> dict[str, dict[str, Any]]:
    """How well each head predicts labels it was not trained on.

    For each head: `n` observed labels, `mae`, `mae_of_mean` (of always saying the training mean), `pearson`,
    `spearman`; `length_correlation` of its scores and `label_length_correlation` of its labels with the
    reply's tokens; `head_correlation` of its scores with every other head's. Pearson throughout unless named
    otherwise; None where it is not defined. Plain numbers, ready for JSON.
    """
    labels = label_matrix(examples, model.head_names).double().numpy()
    prompt_ids, completion_ids, prompt_of = model.encode(
        [example.prompt for example in examples], [example.completion for example in examples]
    )
    scores = model.score_ids(prompt_ids, completion_ids, prompt_of, token_budget).double().numpy()
    length = np.array([len(ids) for ids in completion_ids], dtype=float)
    report: dict[str, dict[str, Any]] = {}
    for k, head in enumerate(model.heads):
        seen = ~np.isnan(labels[:, k])
        label, score = labels[seen, k], scores[seen, k]
        report[head.name] = {
            "n": int(seen.sum()),
            "mae": float(np.abs(score - label).mean()) if seen.any() else None,
            "mae_of_mean": float(np.abs(head.mean - label).mean()) if seen.any() else None,
            "pearson": _correlation(score, label),
            "spearman": _correlation(score, label, ranks=True),
            "length_correlation": _correlation(scores[:, k], length),
            "label_length_correlation": _correlation(label, length[seen]),
            "head_correlation": {
                other.name: _correlation(scores[:, k], scores[:, j])
                for j, other in enumerate(model.heads)
                if j != k
            },
        }
    return report


def _correlation(a: np.ndarray, b: np.ndarray, *, ranks: bool = False) -> float | None:
    """Pearson's r, or Spearman's with `ranks`; None for fewer than two values or one that never varies."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    if ranks:
        a, b = stats.rankdata(a), stats.rankdata(b)
    return float(np.corrcoef(a, b)[0, 1])
