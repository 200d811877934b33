"""Limits on a step's numbers: said first, enforced later, the same after a resume."""

import math
from dataclasses import replace

import pytest

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.limit_settings import LimitSettings
from grpo_fast.config.settings import LossSettings, RolloutSettings, TrainConfig
from grpo_fast.errors import UserError
from grpo_fast.trust.limits import Limits, limits_of, passed
from grpo_fast.trust.watch import metrics_of

CONFIG = replace(TrainConfig(), limits=LimitSettings(kl=1.0, patience=4, skipped=3))


def steps(limits: Limits, rows: list[dict]) -> list[list[str]]:
    return [list(limits.step(row)) for row in rows]


def kl(*values: float | None) -> list[dict]:
    return [{"kl": value} for value in values]


def test_a_limit_is_said_at_first_and_halfway_and_ends_the_run_after_patience_steps():
    limits = Limits(limits_of(CONFIG))
    assert steps(limits, kl(0.5, 1.5, 1.5)) == [[], ["limit_kl"], ["limit_kl"]]
    assert limits.counts() == {"over/kl": 2.0}
    limits.check()
    assert steps(limits, kl(1.5, 1.5)) == [[], []] and limits.exceeded
    with pytest.raises(
        UserError, match=r"over its limit of 1 \(limits.kl\) for 4 steps in a row, now 1.5: .*lr"
    ):
        limits.check()


def test_one_good_step_begins_the_count_anew():
    limits = Limits(limits_of(CONFIG))
    steps(limits, kl(1.5, 1.5, 1.5, 0.5, 1.5, 1.5, 1.5))
    assert not limits.exceeded and limits.counts() == {"over/kl": 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_no_number_is_over_the_limit_in_memory_and_from_a_file(value: float | None):
    limits = Limits(limits_of(CONFIG))
    steps(limits, kl(value, value, value, value))
    with pytest.raises(UserError, match="not finite"):
        limits.check()


def test_a_resumed_run_counts_on_and_one_that_was_stopped_gets_its_patience_again():
    rows = kl(0.5, 1.5, 1.5, 1.5)
    limits = Limits(limits_of(CONFIG), rows)
    limits.step({"kl": 1.5})
    assert limits.exceeded
    again = Limits(limits_of(CONFIG), [*rows, {"kl": 1.5}])
    assert not again.exceeded
    steps(again, kl(1.5, 1.5, 1.5))
    assert not again.exceeded
    again.step({"kl": 1.5})
    assert again.exceeded
    higher = replace(CONFIG, limits=replace(CONFIG.limits, kl=2.0))
    assert Limits(limits_of(higher), rows).counts() == {}


def test_skipped_steps_have_a_patience_of_their_own():
    limits = Limits(limits_of(CONFIG))
    steps(limits, [{"skipped_updates": 1}] * 3)
    with pytest.raises(UserError, match=r"grpo_fast.replay"):
        limits.check()


def test_zero_is_no_limit_and_the_mismatch_follows_the_engines():
    def metrics(**changed) -> dict[str, float]:
        return {limit.name: limit.most for limit in limits_of(replace(TrainConfig(), **changed))}

    assert metrics() == {"kl": 10.0, "ratio": 100.0, "grad_norm": 1000.0, "mismatch": 0.05, "skipped": 0.0}
    off = LimitSettings(kl=0.0, ratio=0.0, grad_norm=0.0, mismatch=0.0, skipped=0)
    assert metrics(limits=off) == {}
    assert metrics(engine=EngineSettings(max_mismatch=0.4))["mismatch"] == 0.2
    truncated = {"rollout": RolloutSettings(top_p=0.9), "loss": LossSettings(mismatch="truncate")}
    assert "mismatch" not in metrics(**truncated)
    assert all(metrics_of(f"limit_{name}") for name in metrics())


def test_the_report_is_told_from_the_rows_alone():
    rows = [{"step": s, "over/kl": float(n)} if n else {"step": s} for s, n in enumerate([0, 1, 2, 0, 1], 1)]
    assert passed(rows) == [
        (2, "limit_kl", "limits.kl is passed, from here on in 3 steps, at most 2 in a row")
    ]
