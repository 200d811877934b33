"""Warnings of a run whose rewards stop meaning what they did."""

import io
import random
import tracemalloc

from grpo_fast.run.progress import Progress
from grpo_fast.trust.watch import WINDOW, Watch, signs


def rows(outside: list[float], spread: list[float] | None = None) -> list[dict]:
    spread = spread or [0.1] * len(outside)
    return [{"outside_frac": o, "spread/tone": s} for o, s in zip(outside, spread, strict=True)]


def test_a_policy_that_stays_where_the_reward_model_was_trained_is_left_alone():
    assert signs(rows([0.05, 0.09, 0.0, 0.08] * 6)) == {}


def test_leaving_the_training_distribution_is_said_with_both_shares():
    found = signs(rows([0.01] * 10 + [0.4] * WINDOW))
    assert list(found) == ["outside"] and "40%" in found["outside"] and "1%" in found["outside"]


def test_one_odd_batch_rings_no_bell():
    assert signs(rows([0.01] * 12 + [0.6] + [0.01] * 2)) == {}


def test_a_policy_that_starts_outside_must_go_further_out():
    assert signs(rows([0.2] * 20)) == {}
    assert signs(rows([0.2] * 10 + [0.9] * WINDOW))


def test_completions_that_are_strange_from_the_start_are_said_too():
    assert list(signs(rows([0.9] * 10))) == ["outside"]


def test_an_ensemble_that_disagrees_more_and_more_is_named():
    found = signs(rows([0.0] * 20, [0.1] * 15 + [0.2] * WINDOW))
    assert list(found) == ["spread/tone"] and "2.0 times as unsure of tone" in found["spread/tone"]
    assert signs(rows([0.0] * 20, [0.1] * 15 + [0.14] * WINDOW)) == {}


def test_each_sign_is_said_once_and_not_again_after_a_resume():
    watch, said = Watch(), []
    history = rows([0.01] * 10 + [0.5] * 10)
    for step, row in enumerate(history):
        new = watch.step(row)
        said += [(step, name) for name in new]
        row |= {f"warning/{name}": 1.0 for name in new}
    assert [name for _, name in said] == ["outside"]
    again = Watch(history)
    assert again.step({"outside_frac": 0.6, "spread/tone": 0.1}) == {}
    assert Watch(history[:10]).step({"outside_frac": 0.9, "spread/tone": 0.1}) != {}


def test_completions_that_drift_away_are_said_and_those_that_come_nearer_are_not():
    found = signs([{"distance": 1.0}] * 10 + [{"distance": 1.3}] * WINDOW)
    assert list(found) == ["distance"] and "1.30 times" in found["distance"]
    assert signs([{"distance": 1.0}] * 10 + [{"distance": 0.7}] * WINDOW) == {}


def test_a_policy_that_is_still_nearer_than_at_its_start_is_left_alone():
    nearer = [{"distance": d} for d in [1.0] * 5 + [0.7] * 10 + [0.85] * 10]
    assert signs(nearer) == {}
    assert list(signs([*nearer, *[{"distance": 1.05}] * WINDOW])) == ["distance"]


def test_steps_without_the_metrics_are_skipped():
    assert signs([{"loss": 1.0}] * 30) == {}


def test_a_long_run_takes_no_more_room_than_a_short_one():
    def room(steps: int) -> int:
        draw = random.Random(0)
        watch, progress = Watch(), Progress(["a"], file=io.StringIO())
        progress.phase("grpo", steps)
        tracemalloc.start()
        for step in range(1, steps + 1):
            row = {f"metric/{i}": draw.random() for i in range(20)}
            row |= {"reward/a": draw.random(), "group_std/a": 1.0}
            watch.step(row)
            progress.file.seek(0)  # what is printed is not what is meant
            progress.update(step, row)
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return taken

    short = room(600)
    assert room(1800) < short + 20_000  # bytes; a number kept of each step would take twice that
