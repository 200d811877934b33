"""Labelled replies, the heads of a reward model and the statistics that give each head its unit.

Dimension letters: S replies, R heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from grpo_fast.errors import UserError

HEADS_FILE = "reward_heads.json"

PromptLike = str | list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """One objective and the unit of its labels."""

    name: str
    kind: Literal["regression", "binary"] = "regression"
    """regression: squared error on (label - mean) / std. binary: cross entropy of labels in [0, 1]."""
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    """The smallest label seen in training; scores are not cut to the range."""
    high: float = 1.0


@dataclass(frozen=True)
class LabelledReply:
    """One reply and its labels in the heads' order, NaN where one is missing. `prompt`: text or messages."""

    prompt: PromptLike
    completion: str
    labels: tuple[float, ...]


def label_matrix(examples: Sequence[LabelledReply], heads: Sequence[str]) -> Tensor:
    """The labels of all examples, (S, R) float32; UserError for a wrong count or an infinite label."""
    for i, example in enumerate(examples):
        if len(example.labels) != len(heads):
            raise UserError(
                f"labelled reply {i + 1}: has {len(example.labels)} labels, expected {len(heads)} "
                f"({', '.join(heads)})"
            )
    labels = torch.tensor([example.labels for example in examples], dtype=torch.float32).reshape(
        -1, len(heads)
    )
    infinite = torch.isinf(labels).nonzero()
    if len(infinite):
        row, column = infinite[0].tolist()
        raise UserError(
            f"labelled reply {row + 1}: label {heads[column]} is infinite; use NaN for a missing label"
        )
    return labels


def heads_of(
    names: Sequence[str],
    examples: Sequence[LabelledReply],
    kinds: dict[str, Literal["regression", "binary"]] | None = None,
) -> list[Head]:
    """Heads with the statistics of the observed training labels; UserError for a head without any."""
    labels = label_matrix(examples, names)
    heads = []
    for column, name in enumerate(names):
        kind = (kinds or {}).get(name, "regression")
        values = labels[:, column]
        values = values[~torch.isnan(values)].double()
        if not len(values):
            raise UserError(
                f"labelled replies: none of {len(labels)} has a label for {name}; at least one is needed"
            )
        low, high = values.min().item(), values.max().item()
        if kind == "binary" and (low < 0 or high > 1):
            raise UserError(
                f"labelled replies: {name} is binary, so labels must be in [0, 1], got {low} to {high}"
            )
        std = values.std(correction=0).item()
        mean = values.mean().item()
        heads.append(
            Head(name=name, kind=kind, mean=mean, std=std if std > 1e-6 else 1.0, low=low, high=high)
        )
    return heads


def write_heads(folder: str | Path, heads: Sequence[Head]) -> None:
    """Write `reward_heads.json` into an existing folder."""
    text = json.dumps({"heads": [asdict(head) for head in heads]}, indent=2)
    (Path(folder) / HEADS_FILE).write_text(text + "\n")


def read_heads(source: str, shown: str) -> list[Head]:
    """The heads saved in the folder `source` (called `shown` in messages); UserError if they are unsound."""
    where = f"reward model {shown}: {HEADS_FILE}"
    file = Path(source) / HEADS_FILE
    if not file.is_file():
        raise UserError(
            f"{where} is missing; it is written beside the weights when a reward model is trained"
        )
    try:
        rows = json.loads(file.read_text())["heads"]
        heads = [Head(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    names = [head.name for head in heads]
    if not heads or len(set(map(str, names))) < len(names):
        raise UserError(f"{where} must name at least one head and none twice, got {names}")
    for head in heads:
        numbers = (head.mean, head.std, head.low, head.high)
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) or head.std <= 0:
            raise UserError(
                f"{where}: head {head.name}: mean, std, low, high must be finite and std > 0, got {numbers}"
            )
        if head.kind not in ("regression", "binary"):
            raise UserError(
                f"{where}: head {head.name}: kind must be regression or binary, got {head.kind!r}"
            )
    return heads
