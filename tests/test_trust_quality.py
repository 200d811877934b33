"""A head that predicts is called trustworthy, one that does not is not, and the reasons say why."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from grpo_fast.errors import UserError
from grpo_fast.trust.measures import (
    calibration_error,
    correlation,
    pair_accuracy,
    reliability,
    spearman_interval,
    wilson_interval,
)
from grpo_fast.trust.quality import HeadView, trust_report

RNG = np.random.default_rng
RATED = HeadView(name="help", kind="regression", low=0, high=4, mean=2, std=1)
BINARY = HeadView(name="safe", kind="binary", low=0, high=1, mean=0.5, std=0.5)
PAIRWISE = HeadView(name="better", kind="pairwise")


def report_of(head, score, label, length=None, **more):
    length = RNG(9).integers(5, 200, len(score)) if length is None else length
    return trust_report(np.array(score)[:, None], np.array(label)[:, None], length, [head], **more)[head.name]


def rated(n, noise, seed=0):
    rng = RNG(seed)
    label = rng.uniform(0, 4, n)
    return label + noise * rng.standard_normal(n), label


def test_a_good_head_is_trustworthy():
    found = report_of(RATED, *rated(300, 0.4))
    assert found["verdict"] == "trustworthy" and found["reasons"] == []
    assert found["spearman"] > 0.9 and found["pairwise_accuracy"] > 0.85
    assert found["mae"] < 0.4 < found["mae_of_mean"] and found["ece_of_range"] == found["ece"] / 4


@pytest.mark.parametrize("seed", range(10))
def test_a_head_given_noise_is_untrustworthy(seed):
    rng = RNG(seed)
    found = report_of(RATED, rng.uniform(0, 4, 200), rng.uniform(0, 4, 200))
    assert found["verdict"] == "untrustworthy"
    found = report_of(BINARY, rng.uniform(0, 1, 200), rng.integers(0, 2, 200).astype(float))
    assert found["verdict"] == "untrustworthy" and "coin" in found["reasons"][0]


def test_a_mediocre_head_is_weak_and_the_numbers_are_named():
    found = report_of(RATED, *rated(200, 2.0))
    assert found["verdict"] == "weak"
    reason = next(r for r in found["reasons"] if "rank correlation" in r)
    assert f"{found['spearman']:.2f}" in reason and f"{found['spearman_ci95'][0]:.2f}" in reason


def test_few_labels_are_never_enough():
    found = report_of(RATED, *rated(19, 0.01))
    assert found["verdict"] == "untrustworthy" and "19 held-out labels" in found["reasons"][0]
    assert report_of(RATED, *rated(20, 0.01))["verdict"] == "trustworthy"


def test_missing_labels_are_left_out():
    score, label = rated(200, 0.3)
    label[50:] = np.nan
    found = report_of(RATED, score, label)
    assert found["n"] == 50 and found["mae"] == pytest.approx(np.abs(score - label)[:50].mean())
    assert found["length_correlation"] == pytest.approx(
        np.corrcoef(score[:50], RNG(9).integers(5, 200, 200)[:50])[0, 1]
    )


def test_a_head_without_labels_is_described_by_none():
    found = report_of(RATED, rated(30, 1)[0], np.full(30, np.nan))
    assert found["verdict"] == "untrustworthy" and found["n"] == 0
    for key in ("mae", "pearson", "spearman", "spearman_ci95", "pairwise_accuracy", "ece", "ece_of_range"):
        assert found[key] is None
    assert found["bins"] == []


def test_a_constant_score_has_no_order():
    found = report_of(RATED, np.full(100, 2.0), rated(100, 0)[1])
    assert found["spearman"] is None and found["pairwise_accuracy"] == 0.5
    assert found["verdict"] == "untrustworthy" and "not defined" in found["reasons"][0]


def test_length_is_a_reason_when_the_labels_do_not_ask_for_it():
    rng = RNG(1)
    label = rng.uniform(0, 4, 400)
    length = rng.uniform(10, 300, 400)
    score = label + 0.008 * (length - 155)
    found = report_of(RATED, score, label, length)
    assert found["verdict"] == "weak" and "length" in found["reasons"][0]
    asked = np.clip(label + 0.008 * (length - 155), 0, 4)
    assert report_of(RATED, score, asked, length)["verdict"] == "trustworthy"


def test_two_heads_that_say_the_same_are_weak():
    rng = RNG(2)
    one, two = rng.uniform(0, 4, (2, 300))
    same = one + two
    heads = [RATED, HeadView(name="kind", kind="regression", low=0, high=4, mean=2, std=1)]
    scores = np.stack([same / 2, same / 2 + 0.01 * rng.standard_normal(300)], axis=1)
    found = trust_report(scores, np.stack([one, two], axis=1), rng.integers(1, 99, 300), heads)
    assert any("those of kind" in reason for reason in found["help"]["reasons"])
    assert found["help"]["head_correlation"]["kind"] > 0.99
    assert abs(found["help"]["label_head_correlation"]["kind"]) < 0.2
    alike = trust_report(scores, np.stack([same / 2, same / 2], axis=1), rng.integers(1, 99, 300), heads)
    assert not any("those of kind" in reason for reason in alike["help"]["reasons"])


def test_scores_off_their_scale_are_weak():
    score, label = rated(300, 0.2)
    found = report_of(RATED, score + 1, label)
    assert found["verdict"] == "weak" and "25% of the label range" in found["reasons"][0]


def test_a_rare_yes_is_judged_by_pairs():
    rng = RNG(3)
    label = (np.arange(1000) < 60).astype(float)
    score = np.clip(0.06 + 0.5 * label + 0.1 * rng.standard_normal(1000), 0, 1)
    found = report_of(BINARY, score, label)
    assert found["spearman"] < 0.5 and found["pairwise_accuracy"] > 0.95
    assert found["verdict"] == "trustworthy"


def test_pairwise_heads_are_judged_by_their_comparisons():
    rng = RNG(4)
    n = 400
    strength = rng.standard_normal(n) * 2
    rows = rng.permutation(n).reshape(-1, 2)
    first = rng.random(len(rows)) < 1 / (1 + np.exp(strength[rows[:, 1]] - strength[rows[:, 0]]))
    comparisons = [
        (0, *(row if won else row[::-1]).tolist(), None) for row, won in zip(rows, first, strict=True)
    ]
    labels, length = np.full((n, 1), np.nan), rng.integers(1, 99, n)
    good = trust_report(strength[:, None], labels, length, [PAIRWISE], comparisons)["better"]
    wins = np.mean([strength[b] > strength[w] for _, b, w, _ in comparisons])
    assert good["pairwise_accuracy"] == pytest.approx(wins) and good["n_comparisons"] == 200
    assert good["verdict"] == "trustworthy" and good["ece"] < 0.1 and good["spearman"] is None
    noise = trust_report(rng.standard_normal((n, 1)), labels, length, [PAIRWISE], comparisons)["better"]
    assert noise["verdict"] == "untrustworthy"
    by_length = trust_report(length[:, None] / 10, labels, length, [PAIRWISE], comparisons)["better"]
    assert by_length["length_correlation"] > 0.7 and abs(by_length["label_length_correlation"]) < 0.2
    assert any("length" in reason for reason in by_length["reasons"])


def test_comparisons_that_share_replies_count_less():
    rows = [(0, b, w, None) for b in range(10) for w in range(10, 20)]
    score = -np.arange(20.0)[:, None]
    found = trust_report(score, np.full((20, 1), np.nan), np.arange(20), [PAIRWISE], rows)["better"]
    assert found["n_comparisons"] == 100
    assert found["pairwise_accuracy_ci95"] == wilson_interval(1.0, 10)


def test_the_spread_that_knows_its_errors_correlates_with_them():
    rng = RNG(5)
    label = rng.uniform(0, 4, 300)
    spread = rng.uniform(0, 1, 300)
    score = label + spread * rng.standard_normal(300)
    assert report_of(RATED, score, label, spread=spread[:, None])["spread_error_correlation"] > 0.4
    assert "spread_error_correlation" not in report_of(RATED, score, label)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_everything_is_ready_for_json(n):
    score, label = rated(max(n, 1), 1)
    heads = [RATED, BINARY, PAIRWISE]
    scores, labels = np.stack([score[:n]] * 3, axis=1), np.stack([label[:n]] * 3, axis=1)
    labels[:, 1] = labels[:, 1] > 2
    pairs = [(2, 0, 1, 0.5)] if n > 1 else []
    found = trust_report(scores, labels, np.arange(n), heads, pairs, spread=np.ones((n, 3)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_does_not_fit_is_refused():
    score, label = rated(10, 1)
    with pytest.raises(ValueError, match=r"labels must have shape \(10, 1\), got \(9, 1\)"):
        trust_report(score[:, None], label[:9, None], np.arange(10), [RATED])
    with pytest.raises(ValueError, match="two of 10 rows"):
        trust_report(score[:, None], label[:, None], np.arange(10), [RATED], [(0, 1, 10, None)])
    score[3] = math.nan
    with pytest.raises(UserError, match="held-out reply 4: the score of help is nan"):
        trust_report(score[:, None], label[:, None], np.arange(10), [RATED])


def test_correlations_are_scipy_s():
    score, label = rated(60, 1)
    label = label.round()
    assert correlation(score, label) == pytest.approx(stats.pearsonr(score, label)[0])
    assert correlation(score, label, ranks=True) == pytest.approx(stats.spearmanr(score, label)[0])


def test_wilson_s_interval_is_scipy_s():
    for won, n in ((0, 12), (7, 10), (30, 30)):
        there = stats.binomtest(won, n).proportion_ci(method="wilson")
        assert wilson_interval(won / n, n) == pytest.approx([there.low, there.high], abs=1e-6)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Spearman's of a bivariate normal with r = 0.6 is 6/π·asin(0.3); the share of pairs 1/2 + asin(0.6)/π."""
    rng, held, held_pairs, runs = RNG(6), 0, 0, 400
    for _ in range(runs):
        a = rng.standard_normal(80)
        b = 0.6 * a + 0.8 * rng.standard_normal(80)
        low, high = spearman_interval(correlation(a, b, ranks=True), 80) or (1, 0)
        held += low <= 6 / math.pi * math.asin(0.3) <= high
        share, trials = pair_accuracy(a, b)
        low, high = wilson_interval(share, trials) or (1, 0)
        held_pairs += low <= 0.5 + math.asin(0.6) / math.pi <= high
    assert 0.92 <= held / runs <= 0.98
    assert held_pairs / runs >= 0.95  # a bound, so never too narrow


def test_pairs_are_the_area_under_the_curve():
    score, label = np.array([0.1, 0.4, 0.4, 0.8, 0.3]), np.array([0, 0, 1, 1, 1.0])
    expected = np.mean([(p > q) + 0.5 * (p == q) for p in score[label == 1] for q in score[label == 0]])
    assert pair_accuracy(score, label) == (pytest.approx(expected), 2)


def test_many_pairs_are_sampled_and_close():
    score, label = rated(3000, 1.0)
    share, trials = pair_accuracy(score, label)
    order = np.sign(np.subtract.outer(score, score)) * np.sign(np.subtract.outer(label, label))
    assert share == pytest.approx((order > 0).sum() / (order != 0).sum(), abs=0.01) and 1400 < trials < 1500
    assert pair_accuracy(score, label) == (share, trials)


def test_bins_hold_every_row_once_and_do_not_depend_on_order():
    rng = RNG(7)
    predicted = rng.integers(0, 6, 137) / 5
    observed = (rng.random(137) < predicted).astype(float)
    bins = reliability(predicted, observed)
    assert sum(row["n"] for row in bins) == 137 and 1 < len(bins) <= 10
    order = rng.permutation(137)
    again = reliability(predicted[order], observed[order])
    assert [row["n"] for row in again] == [row["n"] for row in bins]
    assert calibration_error(again) == pytest.approx(calibration_error(bins))
    assert calibration_error(
        [{"predicted": 0.2, "observed": 0.5, "n": 3}, {"predicted": 1, "observed": 1, "n": 1}]
    ) == (pytest.approx(0.225))
