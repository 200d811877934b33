"""Making a head's scores mean what its labels mean, without changing their order.

A temperature for log-odds (Guo et al. 2017, arXiv 1706.04599), an isotonic curve for ratings (Zadrozny & Elkan 2002).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import expit, logit

from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.trust.measures import calibration_error, confidence_of, reliability
from grpo_fast.trust.quality import Kind

MOST_KNOTS = 64
HOTTEST = 20.0  # temperatures are sought in [1/20, 20]: labels that scores split perfectly ask for zero
FEWEST = 20  # rows of each half that a calibration's effect is measured with
_TINY = 1e-7  # probabilities are kept this far from 0 and 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A rising map of one head's scores. Make one with `fit_calibration`."""

    kind: Kind
    temperature: float | None = None
    """binary, pairwise: log-odds are divided by it."""
    knots: tuple[tuple[float, float], ...] = ()
    """regression, ordinal: (score, label), rising; straight lines between them."""

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """The calibrated scores, float64 of the same shape. binary: of probabilities; pairwise: of log-odds.

        Beyond the outermost knots the curve goes on with its mean slope, so that the best and the worst
        replies are not tied.
        """
        scores = np.asarray(scores, dtype=float)
        if self.kind == "pairwise":
            return scores / cast(float, self.temperature)
        if self.kind == "binary":
            return expit(logit(np.clip(scores, _TINY, 1 - _TINY)) / cast(float, self.temperature))
        x, y = np.array(self.knots).T
        slope = (y[-1] - y[0]) / (x[-1] - x[0]) if len(x) > 1 else 0.0
        beyond = np.minimum(scores - x[0], 0.0) + np.maximum(scores - x[-1], 0.0)
        return np.interp(scores, x, y) + slope * beyond

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        if self.temperature is not None:
            return {"kind": self.kind, "temperature": self.temperature}
        return {"kind": self.kind, "knots": [list(knot) for knot in self.knots]}

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "calibration") -> Calibration:
        """What `to_dict` gave; UserError, beginning with `where`, when it cannot be that."""
        if not isinstance(data, Mapping) or data.get("kind") not in get_args(Kind):
            got = data.get("kind") if isinstance(data, Mapping) else data
            hint = did_you_mean(got, get_args(Kind)) if isinstance(got, str) else ""
            raise UserError(f"{where}: kind must be one of {', '.join(get_args(Kind))}, got {got!r}{hint}")
        kind: Kind = data["kind"]
        wanted = "temperature" if kind in ("binary", "pairwise") else "knots"
        if set(data) != {"kind", wanted}:
            raise UserError(f"{where}: of kind {kind} it must hold kind and {wanted}, got {', '.join(data)}")
        value = data[wanted]
        if wanted == "temperature":
            if not _finite(value) or value <= 0:
                raise UserError(f"{where}: temperature must be a finite number above 0, got {value!r}")
            return cls(kind=kind, temperature=float(value))
        if (
            not isinstance(value, list | tuple)
            or not 1 <= len(value) <= MOST_KNOTS
            or not all(isinstance(k, list | tuple) and len(k) == 2 and all(map(_finite, k)) for k in value)
        ):
            raise UserError(
                f"{where}: knots must be 1 to {MOST_KNOTS} pairs of finite numbers [score, label], got "
                f"{_short(value)}"
            )
        for (x0, y0), (x1, y1) in itertools.pairwise(value):
            if x1 <= x0 or y1 < y0:
                raise UserError(
                    f"{where}: knots must rise in both numbers, got [{x0:g}, {y0:g}] before [{x1:g}, {y1:g}]"
                )
        return cls(kind=kind, knots=tuple((float(x), float(y)) for x, y in value))


def fit_calibration(kind: Kind, scores: np.ndarray, labels: np.ndarray) -> Calibration:
    """The calibration of one head on replies that it was not trained on.

    `scores` (n,) in the labels' unit: probabilities for a binary head; for a pairwise one the differences of
    log-odds of the two replies of each comparison. `labels` (n,): for a pairwise head the probability that
    the first of the two is the better one, so ones when the scores are better minus worse. Rows with a NaN
    label are left out. Temperatures minimise the log loss. The isotonic curve has one knot for each level
    set, at the mean of its scores, so that it rises strictly between them, thinned by merging neighbours;
    labels that only fall as scores rise leave a single knot, a constant. UserError when no row has a label or
    a score is not finite.
    """
    scores, labels = _observed(scores, labels)
    if not len(scores):
        raise UserError("calibration: no held-out reply has a label; at least one is needed")
    if kind in ("binary", "pairwise"):
        odds = scores if kind == "pairwise" else logit(np.clip(scores, _TINY, 1 - _TINY))
        bound = math.log(HOTTEST)

        def loss(log_temperature: float) -> float:
            return _log_loss(odds / math.exp(log_temperature), labels)

        best = cast(Any, minimize_scalar(loss, bounds=(-bound, bound), method="bounded"))
        return Calibration(kind=kind, temperature=math.exp(best.x))
    distinct, place, weight = np.unique(scores, return_inverse=True, return_counts=True)
    mean_label = np.bincount(place, labels) / weight
    curve = isotonic_regression(mean_label, weights=weight)
    level = np.repeat(np.arange(len(curve.blocks) - 1), np.diff(curve.blocks))
    x, y, weight = _merged(level, distinct, curve.x, weight)
    if len(x) > MOST_KNOTS:
        middle = np.cumsum(weight) - weight / 2
        group = np.minimum((middle * MOST_KNOTS / weight.sum()).astype(int), MOST_KNOTS - 1)
        x, y, weight = _merged(np.unique(group, return_inverse=True)[1], x, y, weight)
    return Calibration(kind=kind, knots=tuple(zip(x.tolist(), y.tolist(), strict=True)))


def calibration_effect(kind: Kind, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """{"before", "after", "n"}: the expected calibration error in the labels' unit, cross-fitted.

    Arguments as in `fit_calibration`. Each half of the rows (even, odd) is mapped by the calibration of the
    other one, and the error is that of all rows together. None where fewer than 20 rows a half have a label.
    """
    scores, labels = _observed(scores, labels)
    if len(scores) < 2 * FEWEST:
        return {"before": None, "after": None, "n": len(scores)}
    after = np.empty_like(scores)
    for half in (0, 1):
        fitted = fit_calibration(kind, scores[1 - half :: 2], labels[1 - half :: 2])
        after[half::2] = fitted.apply(scores[half::2])
    return {"before": _error(kind, scores, labels), "after": _error(kind, after, labels), "n": len(scores)}


def _error(kind: Kind, scores: np.ndarray, labels: np.ndarray) -> float | None:
    if kind != "pairwise":
        return calibration_error(reliability(scores, labels))
    confidence, first = confidence_of(scores)
    observed = first * labels + (1 - first) * (1 - labels)
    return calibration_error(reliability(confidence, observed))


def _log_loss(odds: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy of labels in [0, 1] and log-odds."""
    return float((np.logaddexp(0.0, odds) - labels * odds).mean())


def _merged(
    group: np.ndarray, x: np.ndarray, y: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted means of x and y of each group (numbered from 0, rising), and the groups' weights."""
    whole = np.bincount(group, weight)
    return np.bincount(group, x * weight) / whole, np.bincount(group, y * weight) / whole, whole


def _observed(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must have one shape (n,), got {scores.shape} and {labels.shape}")
    seen = ~np.isnan(labels)
    unsound = np.flatnonzero(~np.isfinite(scores) & seen)
    if len(unsound):
        row = unsound[0]
        raise UserError(f"calibration: score {row + 1} is {scores[row]}, expected a finite number")
    return scores[seen], labels[seen]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
