"""Limits on a step's numbers: a warning where one is passed, the end of the run where it stays passed.

What is decided follows from the rows of metrics.jsonl alone, so that a resumed run counts on and all processes of a
run decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fast.config.resolve import mismatch_limit
from grpo_fast.config.settings import TrainConfig
from grpo_fast.errors import UserError

Row = Mapping[str, Any]
_SLOWER = "begin again from an earlier checkpoint or the start with a lower optim.lr"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One number that must not stay too large."""

    metric: str
    """Its key in a row of metrics"""
    what: str
    """Its name in a sentence"""
    most: float
    """A step is over the limit where the number is larger, or not finite"""
    patience: int
    """Steps in a row over it that end the run"""
    flag: str
    """The setting that raises it"""
    advice: str

    @property
    def name(self) -> str:
        """What it is called in metrics: `warning/limit_<name>`, `over/<name>`."""
        return self.flag.removeprefix("limits.")

    def passed(self, row: Row) -> bool:
        """Whether a step is over it; NaN and infinities are, which rows read from a file have as None."""
        if self.metric not in row:
            return False
        value = row[self.metric]
        return value is None or not math.isfinite(value) or value > self.most


def limits_of(config: TrainConfig) -> list[Limit]:
    """The limits that a run has."""
    chosen = config.limits
    mismatch = mismatch_limit(config) / 2 if chosen.mismatch is None else chosen.mismatch
    table = [
        (
            "kl",
            "kl",
            "the KL divergence from the reference",
            chosen.kl,
            f"{_SLOWER} or a higher loss.kl_coef",
        ),
        (
            "ratio",
            "ratio_max",
            "the largest probability ratio",
            chosen.ratio,
            f"{_SLOWER}, fewer optim.updates_per_rollout or optim.minibatches, or a loss.ratio_cap",
        ),
        (
            "grad_norm",
            "grad_norm",
            "the gradient's norm",
            chosen.grad_norm,
            f"{_SLOWER}, more optim.warmup_steps or a smaller optim.max_grad_norm",
        ),
        (
            "mismatch",
            "mismatch_k3",
            "the KL divergence of engine and trainer",
            mismatch,
            "see that the engine has the same weights, dtype and sampling, or begin a new run that corrects for it "
            "(loss.mismatch)",
        ),
    ]
    found = [
        Limit(
            metric=metric,
            what=what,
            most=most,
            patience=chosen.patience,
            flag=f"limits.{name}",
            advice=f"{advice}; or go on with a higher --limits.{name}",
        )
        for name, metric, what, most, advice in table
        if most
    ]
    if chosen.skipped:
        skipped = Limit(
            metric="skipped_updates",
            what="the number of steps skipped for a non-finite loss or gradient",
            most=0.0,
            patience=chosen.skipped,
            flag="limits.skipped",
            advice="replay one of the run's dumps to see where it comes from (python -m grpo_fast.replay), then "
            f"{_SLOWER}, --dtype float32 or another policy.attention",
        )
        found.append(skipped)
    return found


class Limits:
    """Counts the steps in a row over each limit."""

    def __init__(self, limits: Sequence[Limit], rows: Sequence[Row] = ()) -> None:
        """`rows`: the steps that an earlier process took."""
        self._limits = limits
        self._over = {limit.name: 0 for limit in limits}
        self._said: set[str] = set()
        self._end = ""
        for row in rows:
            self.step(row)
        self._end = ""  # whoever resumes a run that was stopped gives it as many steps again

    def step(self, metrics: Row) -> dict[str, str]:
        """What this step warns of: `limit_<name>` -> sentence, at the first step over it and halfway to the end."""
        said: dict[str, str] = {}
        for limit in self._limits:
            over = self._over[limit.name] + 1 if limit.passed(metrics) else 0
            self._over[limit.name] = over
            if not over:
                continue
            now, most = _shown(metrics, limit), f"{limit.most:g} ({limit.flag})"
            if over % limit.patience == 0:
                self._end = self._end or (
                    f"{limit.what} has been over its limit of {most} for {over} steps in a row, now {now}: "
                    f"{limit.advice}"
                )
            if limit.name not in self._said or over == (limit.patience + 1) // 2:
                self._said.add(limit.name)
                said[f"limit_{limit.name}"] = (
                    f"{limit.what} is over its limit of {most}: {now}, {over} of the {limit.patience} steps in a row "
                    f"that end the run; {limit.advice}"
                )
        return said

    def counts(self) -> dict[str, float]:
        """`over/<name>`: steps in a row over each limit that is passed now."""
        return {f"over/{name}": float(count) for name, count in self._over.items() if count}

    @property
    def exceeded(self) -> bool:
        """Whether the run is to end after this step."""
        return bool(self._end)

    def check(self) -> None:
        """UserError, with advice, where a limit was passed for too long; called where everything is logged."""
        if self._end:
            raise UserError(self._end, agreed=True)


def passed(rows: Sequence[Row]) -> list[tuple[int, str, str]]:
    """(step, `limit_<name>`, sentence) of each limit that a run's rows were over, for its report."""
    found: dict[str, tuple[int, int, int]] = {}  # first step, steps, most in a row
    for row in rows:
        for key in (key for key in row if key.startswith("over/")):
            first, count, most = found.get(key, (row["step"], 0, 0))
            found[key] = (first, count + 1, max(most, int(row[key] or 0)))
    return [
        (
            first,
            f"limit_{key.removeprefix('over/')}",
            f"limits.{key.removeprefix('over/')} is passed, from here on in {count} step{'s' * (count > 1)}, at most "
            f"{most} in a row",
        )
        for key, (first, count, most) in found.items()
    ]


def _shown(metrics: Row, limit: Limit) -> str:
    value = metrics[limit.metric]
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3g}"
