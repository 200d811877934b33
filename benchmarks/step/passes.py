"""Forward and backward passes of one update in several ways, and whether they give the same gradients.

What `savings` and `benchmarks.ablations` time. Letters: P prompts, S completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from grpo_kernels import LossConfig, linear_grpo_loss
from torch import Tensor
from transformers import PreTrainedModel

from grpo_fast.models.policy import Policy
from grpo_fast.packing import PackedBatch

LOSS = LossConfig.preset("grpo", kl_coef=0.0)
SAME = 1e-4
"""Largest relative difference between two ways' gradients (float32, as one vector) before they are timed."""


LossOf = Callable[[PackedBatch, Tensor, float], Tensor]
"""(batch, advantages of its sequences, normaliser of the step) -> the batch's share of the loss."""


def fused_loss(policy: Policy) -> LossOf:
    """The policy's own loss head: loss and gradients in one pass over the vocabulary."""
    return lambda batch, advantages, normalizer: policy(batch, advantages, LOSS, normalizer=normalizer)[0]


def packed_pass(
    loss_of: LossOf, batches: Sequence[PackedBatch], advantages: Tensor, normalizer: float
) -> Callable[[], None]:
    """A forward and backward pass over every batch; `advantages` (S,) of all sequences of the step."""

    def run() -> None:
        for batch in batches:
            loss_of(batch, advantages[batch.sequence_index], normalizer).backward()

    return run


def positions_of(batches: Sequence[PackedBatch]) -> int:
    """Positions that go through the transformer."""
    return sum(batch.input_ids.shape[1] for batch in batches)


def rectangle(
    prompts: list[list[int]], completions: list[list[int]], owner: list[int], chosen: list[int]
) -> dict[str, Any]:
    """The sequences `chosen` as rows padded on the right with token 0, and what the loss head needs of them."""
    rows = [prompts[owner[i]] + completions[i] for i in chosen]
    width = max(map(len, rows))
    index, lengths = [], [0]
    for line, i in enumerate(chosen):
        first = line * width + len(prompts[owner[i]]) - 1
        index.extend(range(first, first + len(completions[i])))
        lengths.append(lengths[-1] + len(completions[i]))
    return {
        "ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "index": torch.tensor(index),
        "targets": torch.tensor([token for i in chosen for token in completions[i]]),
        "cu_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "chosen": torch.tensor(chosen),
    }


def padded_pass(
    model: PreTrainedModel, rectangles: list[dict[str, Any]], advantages: Tensor, normalizer: float
) -> Callable[[], None]:
    """The same pass over padded rows, with the same loss head.

    No mask is needed or paid for: under causal attention what stands to the right of a sequence does not reach it.
    """
    base: Any = model.base_model
    weight: Any = model.get_output_embeddings()

    def run() -> None:
        for part in rectangles:
            hidden = base(input_ids=part["ids"], use_cache=False).last_hidden_state
            loss, _ = linear_grpo_loss(
                hidden.flatten(0, 1).index_select(0, part["index"]),
                weight.weight,
                part["targets"],
                advantages[part["chosen"]],
                LOSS,
                cu_seqlens=part["cu_seqlens"],
                normalizer=normalizer,
            )
            loss.backward()

    return run


def gradients_of(model: torch.nn.Module, run: Callable[[], None]) -> dict[str, Tensor]:
    """What one call leaves in the parameters, taken out of them."""
    run()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def same_gradients(runs: Mapping[str, tuple[torch.nn.Module, Callable[[], None]]]) -> None:
    """Every run computes the first one's gradients, to `SAME`; AssertionError otherwise."""
    first: dict[str, Tensor] = {}
    for name, (model, run) in runs.items():
        found = gradients_of(model, run)
        model.zero_grad()
        first = first or found
        off = sum(float((found[key] - g).double().square().sum()) for key, g in first.items())
        scale = sum(float(g.double().square().sum()) for g in first.values())
        assert found.keys() == first.keys() and off**0.5 <= SAME * scale**0.5, f"{name}: other gradients"


def cleared(model: torch.nn.Module, run: Callable[[], None]) -> Callable[[], None]:
    """The call, and its gradients thrown away."""

    def timed() -> None:
        run()
        model.zero_grad()

    return timed
