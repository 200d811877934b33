"""A policy that degenerates is noticed; one that learns is left alone."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_fast.config.limit_settings import LimitSettings
from grpo_fast.config.settings import TrainConfig
from grpo_fast.errors import UserError
from grpo_fast.trust.degeneration import WINDOW, signs
from grpo_fast.trust.limits import Limits, limits_of
from grpo_fast.trust.repetition import repeated
from grpo_fast.trust.watch import Watch, metrics_of

DATA = Path(__file__).parent / "data" / "degeneration"


def recorded(name: str) -> list[dict]:
    columns = json.loads((DATA / f"{name}.json").read_text())["metrics"]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def trace(metric: str, *stretches: tuple[int, float]) -> list[dict]:
    return [{metric: value} for count, value in stretches for _ in range(count)]


def rewards(values: list[float], spread: float = 0.2) -> list[dict]:
    return [{"reward/tone": value, "group_std/tone": spread} for value in values]


def test_a_recorded_healthy_run_raises_no_alarm_at_any_step():
    rows, watch, limits = recorded("healthy"), Watch(), Limits(limits_of(TrainConfig()))
    assert len(rows) == 110
    assert [watch.step(row) | limits.step(row) for row in rows] == [{}] * 110
    assert not limits.exceeded


def test_a_recorded_run_with_30_times_the_learning_rate_is_caught_and_stopped():
    config = replace(TrainConfig(), limits=LimitSettings(kl=2.0))
    watch, limits, said = Watch(), Limits(limits_of(config)), {}
    stopped = 0
    for step, row in enumerate(recorded("broken"), start=1):
        said |= {name: step for name in watch.step(row) | limits.step(row) if name not in said}
        stopped = stopped or step * limits.exceeded
    assert said["limit_kl"] <= 6 and said["drift"] == 10  # the first step with two windows
    assert said["truncated"] <= 15 and said["entropy_explosion"] <= 20
    assert stopped == said["limit_kl"] + 9
    with pytest.raises(UserError, match=r"for 10 steps in a row, now [\d.]+: .*loss.kl_coef; .*--limits.kl"):
        limits.check()


@pytest.mark.parametrize(
    ("name", "metric", "good", "bad"),
    [
        ("length_explosion", "length_mean", 100.0, 230.0),
        ("length_collapse", "length_mean", 100.0, 20.0),
        ("truncated", "truncated_frac", 0.1, 0.95),
        ("entropy_collapse", "entropy", 0.6, 0.03),
        ("entropy_explosion", "entropy", 0.6, 3.0),
        ("drift", "kl", 0.1, 3.0),
        ("flat_groups", "flat_groups_frac", 0.2, 1.0),
        ("duplicates", "duplicate_frac", 0.05, 0.8),
        ("loops", "repetition", 0.05, 0.6),
    ],
)
def test_what_goes_wrong_is_named_with_the_step_at_which_it_began(
    name: str, metric: str, good: float, bad: float
):
    found = signs(trace(metric, (20, good), (WINDOW, bad)))
    assert list(found) == [name] and "since step 21:" in found[name]
    assert metrics_of(name) == (metric,)
    assert signs(trace(metric, (25, good))) == {}
    assert signs(trace(metric, (20, good), (1, bad), (4, good))) == {}  # one odd step


def test_slow_change_is_what_one_trains_for():
    longer = [{"length_mean": 50 * 1.01**step} for step in range(300)]  # twenty times as long in the end
    sharper = [{"entropy": 0.8 * 0.99**step} for step in range(150)]
    assert all(signs(longer[:end]) == {} for end in range(10, 300, 7))
    assert signs(sharper) == {}


def test_rewards_that_fall_back_are_noticed_and_those_that_rise_or_rest_are_not():
    up = [0.1 * step / 10 for step in range(31)]
    assert signs(rewards(up)) == {} and signs(rewards(up + [0.3] * 20)) == {}
    found = signs(rewards(up + [0.05] * WINDOW))
    assert list(found) == ["reward_collapse"] and "at step 31" in found["reward_collapse"]
    assert "reward_collapse" in signs(rewards([0.5] * 10 + [0.3] * WINDOW))  # under its start at once
    # an objective that is to be lowered
    assert signs(rewards(up), {"tone": -1.0}).keys() == {"reward_collapse"}
    assert signs(rewards([-value for value in up]), {"tone": -1.0}) == {}


def test_a_trade_between_objectives_is_no_collapse():
    rows = [
        {"reward/a": step / 20, "group_std/a": 0.5, "reward/b": -step / 40, "group_std/b": 0.5}
        for step in range(30)
    ]
    assert signs(rows) == {}
    assert list(signs(rows, {"a": 0.1, "b": 1.0})) == ["reward_collapse"]


def test_groups_whose_rewards_no_longer_differ_are_said():
    rows = rewards([0.5] * 20) + rewards([0.5] * WINDOW, spread=0.004)
    assert list(signs(rows)) == ["no_spread"]


def test_repeated_outputs_are_counted():
    words = list(range(20))
    assert repeated([words, words[1:], words[2:], words[3:]], 2) == {"duplicate_frac": 0.0, "repetition": 0.0}
    found = repeated([words, words, words, [1, 2, 3], words, words[:5]], 3)
    assert found["duplicate_frac"] == pytest.approx(2 / 6)  # the same in another group is no duplicate
    assert repeated([[1, 2] * 50, [7] * 100], 2)["repetition"] == pytest.approx(1 - 3 / 194)
    assert repeated([[1], [1]], 2) == {"duplicate_frac": 0.5, "repetition": 0.0}


def test_counting_repetition_costs_next_to_nothing():
    step = [[(i * j) % 5003 for j in range(512)] for i in range(512)]  # what a step of minutes generates
    started = time.perf_counter()
    repeated(step, 8)
    assert time.perf_counter() - started < 1.0


def test_a_step_is_watched_in_the_same_time_however_many_there_were():
    watch, rows = Watch(), rewards([0.5 + 0.001 * (i % 7) for i in range(6000)])
    spent = []
    for part in (rows[:500], rows[500:-500], rows[-500:]):
        began = time.process_time()
        for row in part:
            watch.step(row)
        spent.append(time.process_time() - began)
    assert spent[2] < 4 * spent[0] + 0.05, spent  # it grew with the run when every step read all rows again
