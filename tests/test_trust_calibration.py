"""Calibration makes scores mean what labels mean and keeps their order."""

import json
import math

import numpy as np
import pytest
from scipy.special import expit, logit

from grpo_fast.errors import UserError
from grpo_fast.trust.calibration import MOST_KNOTS, Calibration, calibration_effect, fit_calibration
from grpo_fast.trust.measures import calibration_error, reliability


def test_a_temperature_that_was_planted_is_found():
    rng = np.random.default_rng(0)
    odds = 1.5 * rng.standard_normal(20_000)
    label = (rng.random(20_000) < expit(odds)).astype(float)
    fitted = fit_calibration("binary", expit(2.5 * odds), label)
    assert fitted.temperature == pytest.approx(2.5, rel=0.05)
    assert fitted.apply(expit(2.5 * odds[:9])) == pytest.approx(
        expit(2.5 * odds[:9] / (fitted.temperature or 0))
    )


def test_comparisons_are_calibrated_by_their_differences():
    rng = np.random.default_rng(1)
    odds = rng.standard_normal(20_000)
    signed = np.where(rng.random(20_000) < expit(odds), odds, -odds)  # better minus worse
    fitted = fit_calibration("pairwise", 3 * signed, np.ones(20_000))
    assert fitted.temperature == pytest.approx(3, rel=0.05)
    assert fitted.apply(np.array([6.0])) == pytest.approx(6 / (fitted.temperature or 0))
    unsigned = fit_calibration("pairwise", 3 * odds, (signed == odds).astype(float))
    assert unsigned.temperature == pytest.approx(fitted.temperature, rel=1e-3)


def test_labels_split_perfectly_keep_a_temperature_in_bounds():
    fitted = fit_calibration("binary", np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.0, 0, 1, 1]))
    assert 0.05 <= (fitted.temperature or 0) < 0.051
    assert np.isfinite(fitted.apply(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize("n", [30, 5000])
def test_a_bent_scale_is_straightened(n):
    rng = np.random.default_rng(2)
    label = rng.uniform(0, 4, n)
    score = np.sqrt(label) + 0.1 * rng.standard_normal(n)
    fitted = fit_calibration("regression", score, label)
    assert 3 < len(fitted.knots) <= MOST_KNOTS
    grid = np.linspace(-2, 4, 500)
    assert (np.diff(fitted.apply(grid)) > 0).all()  # nothing is tied, beyond the knots neither
    assert np.abs(fitted.apply(score) - label).mean() < 0.4 * np.abs(score - label).mean()
    if n == 5000:
        middle = np.array([0.7, 1.0, 1.5, 1.8])
        assert fitted.apply(middle) == pytest.approx(middle**2, abs=0.15)


def test_few_levels_and_equal_scores_work():
    fitted = fit_calibration("ordinal", np.array([1.0, 1, 2, 2, 3]), np.array([0.0, 1, 1, 2, 4]))
    assert fitted.knots == ((1.0, 0.5), (2.0, 1.5), (3.0, 4.0))
    assert fitted.apply(np.array([[1.5], [4.0]])).tolist() == [[1.0], [5.75]]
    falling = fit_calibration("regression", np.array([1.0, 2, 3]), np.array([3.0, 2, 1]))
    assert falling.knots == ((2.0, 2.0),) and falling.apply(np.array([-9.0, 9])).tolist() == [2, 2]


def test_missing_labels_are_left_out():
    score, label = np.array([1.0, 2, np.nan, 3]), np.array([1.0, 2, np.nan, np.nan])
    assert fit_calibration("regression", score, label).knots == ((1.0, 1.0), (2.0, 2.0))
    with pytest.raises(UserError, match="no held-out reply has a label"):
        fit_calibration("regression", score, np.full(4, np.nan))
    with pytest.raises(UserError, match="score 3 is nan"):
        fit_calibration("regression", score, np.ones(4))
    with pytest.raises(ValueError, match=r"one shape \(n,\)"):
        fit_calibration("regression", score, np.ones(3))


def test_the_effect_is_measured_on_rows_that_the_map_has_not_seen():
    rng = np.random.default_rng(3)
    label = rng.uniform(0, 4, 2000)
    effect = calibration_effect("regression", label + 1 + 0.2 * rng.standard_normal(2000), label)
    assert effect["before"] == pytest.approx(1, abs=0.05) and effect["after"] < 0.1 and effect["n"] == 2000
    odds = 1.5 * rng.standard_normal(4000)
    yes = (rng.random(4000) < expit(odds)).astype(float)
    effect = calibration_effect("binary", expit(3 * odds), yes)
    assert effect["before"] > 0.1 > 0.04 > effect["after"]
    signed = np.where(rng.random(4000) < expit(odds), odds, -odds)
    effect = calibration_effect("pairwise", 3 * signed, np.ones(4000))
    assert effect["before"] > 0.1 > 0.04 > effect["after"]


def test_noise_is_not_made_to_look_calibrated():
    """On its own rows an isotonic curve through noise is perfect; on others it is not."""
    rng = np.random.default_rng(4)
    score, label = rng.uniform(0, 1, (2, 60))
    own = fit_calibration("regression", score, label).apply(score)
    seen = calibration_error(reliability(own, label)) or 0
    assert calibration_effect("regression", score, label)["after"] > 2 * seen


def test_too_few_rows_have_no_effect_to_speak_of():
    assert calibration_effect("binary", np.full(39, 0.5), np.ones(39)) == {
        "before": None,
        "after": None,
        "n": 39,
    }


@pytest.mark.parametrize("kind", ["regression", "ordinal", "binary", "pairwise"])
def test_what_is_written_is_what_is_read(kind):
    rng = np.random.default_rng(5)
    score = rng.uniform(0.01, 0.99, 300)
    label = (rng.random(300) < score).astype(float)
    fitted = fit_calibration(kind, logit(score) if kind == "pairwise" else score, label)
    again = Calibration.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    assert again == fitted and (again.apply(score) == fitted.apply(score)).all()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "kind must be one of"),
        ({"kind": "binry", "temperature": 1}, "did you mean binary"),
        ({"kind": "binary", "temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"kind": "binary", "temperature": math.nan}, "got nan"),
        ({"kind": "binary", "temperature": 10**400}, "temperature must be"),
        ({"kind": "binary", "temperature": True}, "got True"),
        ({"kind": "binary"}, "must hold kind and temperature"),
        ({"kind": "ordinal", "knots": [], "extra": 1}, "must hold kind and knots"),
        ({"kind": "ordinal", "knots": []}, "1 to 64 pairs"),
        ({"kind": "ordinal", "knots": [[0, 1]] * 65}, "1 to 64 pairs"),
        ({"kind": "ordinal", "knots": [[0, "a"]]}, "pairs of finite numbers"),
        ({"kind": "ordinal", "knots": [[0, 1], [0, 2]]}, "must rise"),
        ({"kind": "ordinal", "knots": [[0, 1], [1, 0]]}, "must rise"),
    ],
)
def test_unsound_content_is_refused_in_one_line(data, said):
    with pytest.raises(UserError, match=said) as caught:
        Calibration.from_dict(data, where="model/heads.json")
    assert str(caught.value).startswith("model/heads.json: ") and "\n" not in str(caught.value)
