"""The ideas, each with the contender that has it and the same one without it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.ablations.work import HEADS

STEP = ("generation", "scoring", "advantages", "update", "optimizer")
"""The whole step with every idea."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """An idea, and the contenders it is judged by."""

    idea: str
    removed: str
    """What is done instead."""
    kept: str
    """The contender that has the idea."""
    without: str
    """The same without it."""


ABLATIONS = (
    Ablation(
        idea="loss and gradients in one pass over the vocabulary",
        removed="log-probs, then the loss",
        kept="update",
        without="update, log-probs then loss",
    ),
    Ablation(
        idea="no logits in memory",
        removed="whole logits, autograd",
        kept="update",
        without="update, whole logits",
    ),
    Ablation(
        idea="packed rows",
        removed="padded, as they come",
        kept="update, prompts not shared",
        without="update, padded as they come",
    ),
    Ablation(
        idea="packed rows",
        removed="padded, sorted by length",
        kept="update, prompts not shared",
        without="update, padded by length",
    ),
    Ablation(
        idea="packed rows with shared prompts",
        removed="padded, sorted by length",
        kept="update",
        without="update, padded by length",
    ),
    Ablation(
        idea="shared prompts: update",
        removed="a prompt a completion",
        kept="update",
        without="update, prompts not shared",
    ),
    Ablation(
        idea="shared prompts: generation",
        removed="a prompt a completion",
        kept="generation",
        without="generation, prompts not shared",
    ),
    Ablation(
        idea="shared prompts: scoring",
        removed="a prompt a completion",
        kept="scoring",
        without="scoring, prompts not shared",
    ),
    Ablation(
        idea="sequences without signal skipped",
        removed="all trained on",
        kept="update",
        without="update, nothing skipped",
    ),
    Ablation(
        idea="one reward model for all heads",
        removed=f"{len(HEADS)} models of one head",
        kept="scoring",
        without="scoring, a model a head",
    ),
    Ablation(
        idea="an advantage a head (gdpo)",
        removed="rewards added up first",
        kept="advantages",
        without="advantages, scalarized",
    ),
    Ablation(
        idea="no reference model",
        removed="a KL term against a frozen copy",
        kept="update",
        without="update, with a reference",
    ),
)
