"""The heads of a reward model, which of its outputs belong to which, and the statistics that give each its unit.

Dimension letters: S replies, R heads, K members of the ensemble, O outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from grpo_fast.data.ratings import Ratings
from grpo_fast.errors import UserError

if TYPE_CHECKING:
    from grpo_fast.trust.calibration import Calibration

HEADS_FILE = "reward_heads.json"

LOG_VARIANCE_LIMIT = 7.0
"""Predicted log-variances are held within ± this: a label that happens to be hit exactly must not run away."""

MOST_LEVELS = 1000
"""Steps of an ordinal head's scale."""
MOST_MEMBERS = 1000

Kind = Literal["regression", "binary", "ordinal", "pairwise"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """One objective and the unit of its labels."""

    name: str
    kind: Kind = "regression"
    """regression: the output is (label - mean) / std. binary: the log-odds of 1. ordinal: a position among
    `cuts`; the score is the expected level. pairwise: the log-odds of being preferred, up to a constant."""
    mean: float = 0.0
    std: float = 1.0
    """Of the training labels; 0 and 1 for a pairwise head, which has none."""
    low: float = 0.0
    """The scale's lower end, or the smallest label seen in training; scores are not cut to the range."""
    high: float = 1.0
    cuts: tuple[float, ...] = ()
    """ordinal: the output at which a reply is as likely above as below the step from level low + k to the next."""
    better: Literal["high", "low"] = "high"
    """Which end is the good one; a run may say otherwise (`reward.directions`)."""
    calibration: dict[str, Any] | None = None
    """Fitted on held-out labels (`trust.calibration.Calibration`); applied with `reward.calibrated`."""
    verdict: str = ""
    """How far held-out replies say it can be trusted (`trust.quality`); empty: not measured."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which of a reward model's O outputs is which: all heads of member 1, then of member 2, ..., then variances."""

    heads: tuple[Head, ...]
    members: int = 1
    """K outputs of each head: an ensemble on one backbone."""
    gaussian: bool = False
    """Whether each regression head has an output for the logarithm of its variance (in units of std²)."""

    @property
    def names(self) -> list[str]:
        """What each output is called in `id2label`: a plain head name for the first member."""
        heads = [head.name for head in self.heads]
        members = [f"{name}/{k}" for k in range(2, self.members + 1) for name in heads]
        return [*heads, *members, *(f"{heads[r]}/log_variance" for r in self.noisy)]

    @property
    def noisy(self) -> list[int]:
        """Heads with a variance of their own."""
        return [r for r, head in enumerate(self.heads) if self.gaussian and head.kind == "regression"]

    def of_kind(self, kind: Kind) -> list[int]:
        """The heads of a kind."""
        return [r for r, head in enumerate(self.heads) if head.kind == kind]

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """(S, O) -> the members' outputs (S, K, R) and the log-variances (S, len(noisy))."""
        width = self.members * len(self.heads)
        return outputs[:, :width].unflatten(1, (self.members, len(self.heads))), outputs[:, width:]

    def to_units(self, values: Tensor) -> Tensor:
        """Outputs (..., R) in the labels' unit: for a binary head the probability of 1, for ordinal the mean level."""
        mean = values.new_tensor([h.mean for h in self.heads])
        std = values.new_tensor([h.std for h in self.heads])
        result = values * std + mean
        for r, head in enumerate(self.heads):
            if head.kind == "binary":
                result[..., r] = torch.sigmoid(values[..., r])
            elif head.kind == "ordinal":
                above = torch.sigmoid(values[..., r : r + 1] - values.new_tensor(head.cuts))
                result[..., r] = head.low + above.sum(dim=-1)
            elif head.kind == "pairwise":
                result[..., r] = values[..., r]
        return result


def heads_of(ratings: Ratings) -> list[Head]:
    """A head for each of the ratings' own, with the statistics of the observed labels.

    UserError for a head without a label, and for ordinal labels of one level alone.
    """
    heads = []
    for spec in ratings.heads:
        if spec.kind == "pairwise":
            heads.append(Head(name=spec.name, kind="pairwise", better=spec.better))
            continue
        values = np.array(
            [row[spec.name] for e in ratings.examples for row in e.labels if spec.name in row], dtype=float
        )
        if not len(values):
            raise UserError(f"ratings: no reply has a label for {spec.name}; at least one is needed")
        std = float(values.std())
        if spec.kind == "ordinal" and values.min() == values.max():
            raise UserError(
                f"ratings: every label of {spec.name} is {values[0]:g}; ordinal heads need two levels"
            )
        if spec.kind == "ordinal" and values.max() - values.min() > MOST_LEVELS:
            raise UserError(
                f"ratings: labels of {spec.name} go from {values.min():g} to {values.max():g}; an ordinal head has at "
                f"most {MOST_LEVELS} levels: make it regression"
            )
        head = Head(
            name=spec.name,
            kind=spec.kind,
            mean=float(values.mean()),
            std=std if std > 1e-6 else 1.0,
            low=float(values.min()) if spec.low is None else spec.low,
            high=float(values.max()) if spec.high is None else spec.high,
            better=spec.better,
        )
        heads.append(replace(head, cuts=_first_cuts(values)) if spec.kind == "ordinal" else head)
    return heads


def _first_cuts(levels: np.ndarray) -> tuple[float, ...]:
    """The cuts at which an output of zero gives the levels' own frequencies."""
    steps = range(int(levels.min()), int(levels.max()))
    above = np.array([(levels > step).mean() for step in steps]).clip(0.01, 0.99)
    return tuple(float(cut) for cut in np.log((1 - above) / above))


def write_layout(folder: str | Path, layout: Layout) -> None:
    """Write `reward_heads.json` into an existing folder."""
    text = json.dumps(asdict(layout), indent=2)
    (Path(folder) / HEADS_FILE).write_text(text + "\n")


def read_layout(file: Path, shown: str) -> Layout:
    """The layout saved in `file`, of the model called `shown` in messages; UserError if it is unsound."""
    where = f"reward model {shown}: {HEADS_FILE}"
    try:
        saved = json.loads(file.read_text())
        rows = saved.pop("heads")
        heads = tuple(Head(**{**row, "cuts": tuple(row.get("cuts", ()))}) for row in rows)
        layout = Layout(heads=heads, **saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    names = [head.name for head in heads]
    for name in names:
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: a head's name must be a text, got {name!r}")
    if not heads or len(set(names)) < len(names):
        raise UserError(f"{where} must name at least one head and none twice, got {names}")
    if (
        type(layout.members) is not int
        or not 1 <= layout.members <= MOST_MEMBERS
        or type(layout.gaussian) is not bool
    ):
        raise UserError(
            f"{where}: members must be a number from 1 to {MOST_MEMBERS} and gaussian true or false"
        )
    for head in heads:
        _check_head(head, where)
    return layout


def _check_head(head: Head, where: str) -> None:
    numbers = (head.mean, head.std, head.low, head.high, *head.cuts)
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) or head.std <= 0:
        raise UserError(
            f"{where}: head {head.name}: mean, std, low, high and cuts must be finite and std > 0, got {numbers}"
        )
    if head.kind not in ("regression", "binary", "ordinal", "pairwise"):
        raise UserError(
            f"{where}: head {head.name}: kind must be regression, binary, ordinal or pairwise, got {head.kind!r}"
        )
    if head.kind == "ordinal" and not head.cuts:
        raise UserError(f"{where}: head {head.name} is ordinal and has no cuts")
    if head.calibration is not None:
        calibration_of(head, where)


def calibration_of(head: Head, where: str = "reward model") -> Calibration:
    """The calibration a head was given; UserError where it is unsound."""
    from grpo_fast.trust.calibration import Calibration  # brings scipy, which scoring alone does not need

    return Calibration.from_dict(head.calibration, where=f"{where}: calibration of {head.name}")


def label_matrix(labels: Sequence[dict[str, float]], heads: Sequence[str]) -> Tensor:
    """Labels by head name as (S, R) float32, NaN where one is missing; UserError for one that is infinite."""
    rows = [[row.get(name, math.nan) for name in heads] for row in labels]
    matrix = torch.tensor(rows, dtype=torch.float32).reshape(-1, len(heads))
    infinite = torch.isinf(matrix).nonzero()
    if len(infinite):
        row, column = infinite[0].tolist()
        raise UserError(f"rated reply {row + 1}: label {heads[column]} is infinite; leave a missing one out")
    return matrix
