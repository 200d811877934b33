"""How well each head of a reward model predicts labels it has not seen, and whether that is enough to be trusted.

Letters: n held-out replies, R heads, m comparisons. Everything returned is ready for JSON: plain numbers,
None where a measure is not defined, never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import expit

from grpo_fast.errors import UserError
from grpo_fast.trust.measures import (
    calibration_error,
    confidence_of,
    correlation,
    pair_accuracy,
    reliability,
    sign_correlation,
    spearman_interval,
    wilson_interval,
    won,
)

Kind = Literal["regression", "binary", "ordinal", "pairwise"]
Verdict = Literal["trustworthy", "weak", "untrustworthy"]
Comparison = tuple[int, int, int, float | None]
"""(head, row of the better reply, row of the worse one, margin or None)."""

MOST_POINTS = 200  # (length, score, label) kept for a plot


@dataclass(frozen=True, kw_only=True)
class HeadView:
    """A head as this package sees it: the unit of its scores and the statistics of its training labels."""

    name: str
    kind: Kind
    low: float = 0.0
    """The smallest label of training."""
    high: float = 1.0
    mean: float = 0.0
    std: float = 1.0


class Rule(NamedTuple):
    """One reason not to trust a head."""

    limit: float
    verdict: Verdict
    why: str


# Ranking is judged by the lower end of its 95% interval: Spearman's for regression and ordinal heads; the share of
# pairs put in the right order for binary heads (the area under the ROC curve; the rank correlation with a
# rare yes is small even for a perfect head) and for pairwise heads.
RULES = {
    "too_few": Rule(20, "untrustworthy", "with fewer labels the interval of a rank correlation says nothing"),
    "no_order": Rule(0.1, "untrustworthy", "GRPO only uses the order in a group, and it may be pure chance"),
    "coin": Rule(0.55, "untrustworthy", "a coin gets 0.5 and, with luck, a little more"),
    "poor_order": Rule(0.5, "weak", "less than a quarter of the ranks' variance may be explained"),
    "poor_choice": Rule(0.65, "weak", "more than a third of the comparisons may be decided wrongly"),
    "length": Rule(0.3, "weak", "a policy would be paid for length that the labels do not ask for"),
    "one_voice": Rule(0.95, "weak", "two heads that say the same are one objective counted twice"),
    "labels_apart": Rule(0.8, "weak", "above this the labels themselves say almost the same"),
    "off_scale": Rule(
        0.15, "weak", "scores mean something else than labels; calibrate before weighing heads"
    ),
}


def trust_report(
    scores: np.ndarray,  # (n, R) in the labels' unit; binary: probability; pairwise: log-odds
    labels: np.ndarray,  # (n, R), NaN where one is missing
    lengths: np.ndarray,  # (n,) reply tokens
    heads: Sequence[HeadView],
    comparisons: Sequence[Comparison] = (),
    *,
    spread: np.ndarray | None = None,  # (n, R) standard deviation over an ensemble
) -> dict[str, dict[str, Any]]:
    """For each head, what held-out replies say about it.

    `n` labels and `n_comparisons`; `mae` and `mae_of_mean` (of always saying the training mean) in the
    labels' unit; `pearson`, `spearman` and `spearman_ci95` (Fisher's z with the variance of Bonett & Wright
    2000); `pairwise_accuracy` and `pairwise_accuracy_ci95`: the share of pairs of different labels, of
    comparisons for a pairwise head, that the scores put in the right order, a tie counting half, with
    Wilson's interval; `bins` [{predicted, observed, n}] of a reliability plot, `ece` their mean distance in
    the labels' unit and `ece_of_range` the same as a share of the label range; `length_correlation` of the
    scores and `label_length_correlation` of the labels, on the same replies (pairwise: of who wins and the
    difference in length); `head_correlation` and `label_head_correlation` {other head: Pearson's r};
    `spread_error_correlation` (Spearman's) with `spread`; `points` for a plot of score against length;
    `verdict` and `reasons`, sentences of the `RULES` that the head breaks.

    Pairs share replies, so an interval counts no more of them than there are disjoint ones, which bounds the
    variance (Hoeffding 1948). Replies to one prompt are taken as independent. ValueError for shapes that do
    not fit, UserError for a score that is not finite.
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    lengths = np.asarray(lengths, dtype=float)
    _check(scores, labels, lengths, heads, comparisons, spread)
    report: dict[str, dict[str, Any]] = {}
    for k, head in enumerate(heads):
        pairs = np.array([(better, worse) for h, better, worse, _ in comparisons if h == k], dtype=int)
        pairs = pairs.reshape(-1, 2)
        seen = ~np.isnan(labels[:, k])
        measured = {"kind": head.kind, "n": int(seen.sum()), "n_comparisons": len(pairs)}
        if head.kind == "pairwise":
            measured |= _compared(scores[:, k], lengths, pairs, None if spread is None else spread[:, k])
        else:
            spread_seen = None if spread is None else spread[seen, k]
            measured |= _rated(head, scores[seen, k], labels[seen, k], lengths[seen], spread_seen)
        others = [(j, other.name) for j, other in enumerate(heads) if j != k]
        measured["head_correlation"] = {name: correlation(scores[:, k], scores[:, j]) for j, name in others}
        measured["label_head_correlation"] = {
            name: correlation(labels[both, k], labels[both, j])
            for j, name in others
            for both in [seen & ~np.isnan(labels[:, j])]
        }
        measured["points"] = _points(scores[:, k], labels[:, k], lengths)
        report[head.name] = measured | _verdict(head, measured)
    return report


def _rated(
    head: HeadView, score: np.ndarray, label: np.ndarray, length: np.ndarray, spread: np.ndarray | None
) -> dict[str, Any]:
    """Measures of a head whose replies are rated one by one; everything (labels,)."""
    n = len(label)
    spearman = correlation(score, label, ranks=True)
    accuracy, trials = pair_accuracy(score, label)
    bins = reliability(score, label)
    ece, span = calibration_error(bins), head.high - head.low
    error = np.abs(score - label)
    found: dict[str, Any] = {
        "mae": float(error.mean()) if n else None,
        "mae_of_mean": float(np.abs(head.mean - label).mean()) if n else None,
        "pearson": correlation(score, label),
        "spearman": spearman,
        "spearman_ci95": spearman_interval(spearman, n),
        "pairwise_accuracy": accuracy,
        "pairwise_accuracy_ci95": wilson_interval(accuracy, trials),
        "ece": ece,
        "ece_of_range": ece / span if ece is not None and span > 0 else None,
        "bins": bins,
        "length_correlation": correlation(score, length),
        "label_length_correlation": correlation(label, length),
    }
    if spread is not None:
        found["spread_error_correlation"] = correlation(spread, error, ranks=True)
    return found


def _compared(
    score: np.ndarray, length: np.ndarray, pairs: np.ndarray, spread: np.ndarray | None
) -> dict[str, Any]:
    """Measures of a head trained on comparisons; `pairs` (m, 2) rows of the better and the worse reply."""
    better, worse = pairs[:, 0], pairs[:, 1]
    difference, longer = score[better] - score[worse], length[better] - length[worse]
    accuracy = float(won(difference).mean()) if len(pairs) else None
    bins = reliability(*confidence_of(difference))
    ece = calibration_error(bins)
    found: dict[str, Any] = {
        "mae": None,
        "mae_of_mean": None,
        "pearson": None,
        "spearman": None,
        "spearman_ci95": None,
        "pairwise_accuracy": accuracy,
        "pairwise_accuracy_ci95": wilson_interval(accuracy, min(len(pairs), len(np.unique(pairs)) // 2)),
        "ece": ece,
        "ece_of_range": ece,
        "bins": bins,
        "length_correlation": sign_correlation(np.sign(difference), longer),
        "label_length_correlation": sign_correlation(np.ones(len(pairs)), longer),
    }
    if spread is not None:
        of_pair = np.hypot(spread[better], spread[worse])
        found["spread_error_correlation"] = correlation(of_pair, expit(-difference), ranks=True)
    return found


def _points(score: np.ndarray, label: np.ndarray, length: np.ndarray) -> list[dict[str, float | None]]:
    rows = np.unique(np.linspace(0, len(score) - 1, min(len(score), MOST_POINTS)).round().astype(int))
    return [
        {
            "length": float(length[i]),
            "score": float(score[i]),
            "label": None if np.isnan(label[i]) else float(label[i]),
        }
        for i in rows
    ]


def _verdict(head: HeadView, measured: dict[str, Any]) -> dict[str, Any]:
    """`verdict` and `reasons`: the worst verdict among the rules broken, trustworthy when none is."""
    pairwise = head.kind == "pairwise"
    n, unit = (measured["n_comparisons"], "comparisons") if pairwise else (measured["n"], "labels")
    by_choice = head.kind in ("binary", "pairwise")
    name = "share of pairs in the right order" if by_choice else "rank correlation with the labels"
    bounds = measured["pairwise_accuracy_ci95" if by_choice else "spearman_ci95"]
    value = measured["pairwise_accuracy" if by_choice else "spearman"]
    broken: list[tuple[Rule, str]] = []
    if n < RULES["too_few"].limit:
        broken.append((RULES["too_few"], f"{n} held-out {unit}, fewer than {RULES['too_few'].limit:g}"))
    if bounds is None:
        rule = RULES["coin" if by_choice else "no_order"]
        broken.append((rule, f"the {name} is not defined (the labels or the scores never differ)"))
    else:
        for rule in (
            (RULES["coin"], RULES["poor_choice"]) if by_choice else (RULES["no_order"], RULES["poor_order"])
        ):
            if bounds[0] <= rule.limit:
                text = f"the {name} is {value:.2f}, its lower 95% bound {bounds[0]:.2f} is at most {rule.limit:g}"
                broken.append((rule, text))
                break
    score_length, label_length = measured["length_correlation"], measured["label_length_correlation"]
    if score_length is not None and abs(score_length) - abs(label_length or 0.0) > RULES["length"].limit:
        text = f"scores correlate with length by {score_length:.2f}, labels by {label_length or 0.0:.2f}"
        broken.append((RULES["length"], text))
    for other, r in measured["head_correlation"].items():
        of_labels = measured["label_head_correlation"][other]
        if r is None or of_labels is None or of_labels >= RULES["labels_apart"].limit:
            continue
        if r > RULES["one_voice"].limit:
            text = f"scores correlate with those of {other} by {r:.2f}, labels by {of_labels:.2f}"
            broken.append((RULES["one_voice"], text))
    if (share := measured["ece_of_range"]) is not None and share > RULES["off_scale"].limit:
        text = f"scores are off by {share:.0%} of the label range on average"
        broken.append((RULES["off_scale"], text))
    found = {rule.verdict for rule, _ in broken}
    verdict = next((v for v in ("untrustworthy", "weak") if v in found), "trustworthy")
    return {"verdict": verdict, "reasons": [f"{text}: {rule.why}" for rule, text in broken]}


def _check(
    scores: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    heads: Sequence[HeadView],
    comparisons: Sequence[Comparison],
    spread: np.ndarray | None,
) -> None:
    n, shape = len(scores), (len(scores), len(heads))
    for name, array, expected in (
        ("scores", scores, shape),
        ("labels", labels, shape),
        ("lengths", lengths, (n,)),
        ("spread", spread, shape),
    ):
        if array is not None and np.shape(array) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {np.shape(array)}")
    for head, better, worse, _ in comparisons:
        if not (0 <= head < len(heads) and 0 <= better < n and 0 <= worse < n and better != worse):
            raise ValueError(
                f"a comparison must name one of {len(heads)} heads and two of {n} rows, got "
                f"({head}, {better}, {worse})"
            )
    unsound = np.argwhere(~np.isfinite(scores))
    if len(unsound):
        row, column = unsound[0]
        raise UserError(
            f"held-out reply {row + 1}: the score of {heads[column].name} is {scores[row, column]}, expected a "
            "finite number; the reward model's weights or its training are broken"
        )
