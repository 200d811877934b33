"""The statistics that the measures of a reward model are made of; None where one is not defined, never NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.special import expit

Z95 = 1.959964  # two-sided 95% of the normal distribution
MOST_BINS, FEWEST_IN_BIN = 10, 10  # of a reliability plot
MOST_PAIRS = 100_000  # pairs of labels looked at; more would sharpen nothing that 2/n has not already blurred


def reliability(predicted: np.ndarray, observed: np.ndarray) -> list[dict[str, float]]:
    """Means of both, (n,) and (n,), in at most 10 bins of about equally many predictions, at least 10 each.

    Equal predictions share a bin, so that the order of the rows changes nothing.
    """
    if not len(predicted):
        return []
    count = max(1, min(MOST_BINS, len(predicted) // FEWEST_IN_BIN))
    edges = np.unique(np.quantile(predicted, np.arange(1, count) / count))
    bin_of = np.searchsorted(edges, predicted, side="right")
    return [
        {
            "predicted": float(predicted[inside].mean()),
            "observed": float(observed[inside].mean()),
            "n": int(inside.sum()),
        }
        for b in np.unique(bin_of)
        for inside in [bin_of == b]
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float | None:
    """Expected calibration error: the bins' mean |predicted - observed|, weighted by their sizes."""
    if not bins:
        return None
    whole = sum(row["n"] for row in bins)
    return sum(row["n"] * abs(row["predicted"] - row["observed"]) for row in bins) / whole


def confidence_of(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probability of the predicted winner, whether it won) of better-minus-worse log-odds, both (m,)."""
    return expit(np.abs(differences)), won(differences)


def correlation(a: np.ndarray, b: np.ndarray, *, ranks: bool = False) -> float | None:
    """Pearson's r, or Spearman's with `ranks`; None for fewer than two values or one that never varies."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    if ranks:
        a, b = stats.rankdata(a), stats.rankdata(b)
    r = float(np.corrcoef(a, b)[0, 1])
    return min(1.0, max(-1.0, r)) if math.isfinite(r) else None


def spearman_interval(r: float | None, n: int) -> list[float] | None:
    """95% interval of a rank correlation of n pairs: Fisher's z with variance (1 + r²/2)/(n - 3)."""
    if r is None or n < 4:
        return None
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))
    half = Z95 * math.sqrt((1 + r * r / 2) / (n - 3))
    return [math.tanh(centre - half), math.tanh(centre + half)]


def wilson_interval(share: float | None, n: float) -> list[float] | None:
    """Wilson's 95% score interval of a share among n independent trials."""
    if share is None or n <= 0:
        return None
    whole = 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / whole
    half = Z95 / whole * math.sqrt(share * (1 - share) / n + (Z95 / (2 * n)) ** 2)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def won(differences: np.ndarray) -> np.ndarray:
    """1 where the better one has the higher score, 0.5 for a tie, else 0."""
    return 0.5 * (np.sign(differences) + 1)


def sign_correlation(sign: np.ndarray, difference: np.ndarray) -> float | None:
    """Pearson's r of signs with differences, each comparison taken in both directions, so that means are 0."""
    scale = math.sqrt(float((sign**2).sum() * (difference**2).sum()))
    return float((sign * difference).sum()) / scale if len(sign) >= 2 and scale > 0 else None


def pair_accuracy(score: np.ndarray, label: np.ndarray) -> tuple[float | None, float]:
    """Share of pairs of different labels in the scores' order, and how many independent trials that is worth.

    All pairs while they are few, else a fixed random choice of them. Pairs share replies; a mean over all of
    them varies no more than one over as many disjoint pairs as the replies make up (Hoeffding 1948), and
    drawing pairs adds the variance of a share among those drawn.
    """
    n = len(label)
    if n < 2 or np.ptp(label) == 0:
        return None, 0
    every = n * (n - 1) // 2 <= MOST_PAIRS
    if every:
        first, second = np.triu_indices(n, 1)
    else:
        generator = np.random.default_rng(0)
        first = generator.integers(n, size=MOST_PAIRS)
        second = (first + generator.integers(1, n, size=MOST_PAIRS)) % n
    different = label[first] != label[second]
    first, second = first[different], second[different]
    if not len(first):
        return None, 0
    right = np.sign(label[first] - label[second]) * np.sign(score[first] - score[second])
    most_frequent = int(np.unique(label, return_counts=True)[1].max())
    disjoint = min(n // 2, n - most_frequent)
    return float(won(right).mean()), disjoint if every else 1 / (1 / disjoint + 1 / len(first))
