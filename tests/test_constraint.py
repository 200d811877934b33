"""Rewards with a floor: how their multipliers move, and that an interrupted run goes on with them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from grpo_fast import state
from grpo_fast.config.settings import RewardSettings
from grpo_fast.constraint import Multipliers
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.rewards.functions import objective_weights
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import read_rows, reproducible
from grpo_fast.train import main
from tests.tiny import save_policy, write_prompts

NAN = float("nan")
NAMES = ["help", "safe", "cost"]


def rewards(safe: float, cost: float = 0.0) -> torch.Tensor:
    """(4, 3) whose columns have these means and a standard deviation of 2."""
    spread = torch.tensor([-2.0, 2.0, -2.0, 2.0])
    return torch.stack([spread, spread + safe, spread + cost], dim=1)


def made(floors: dict[str, float], lr: float = 0.1, **given) -> Multipliers:
    settings = RewardSettings(floors=floors, **given)
    return Multipliers(NAMES, objective_weights(NAMES, settings), floors, lr=lr)


def test_without_a_floor_the_weights_stay_as_they_are():
    weights = torch.tensor([0.3, -2.0, 0.0])
    multipliers = Multipliers(NAMES, weights, {}, lr=0.1)
    assert multipliers.update(rewards(-9.0)) == {}
    assert torch.equal(multipliers.weights(), weights) and multipliers.state == {}


def test_the_multiplier_rises_below_the_floor_and_falls_to_zero_above():
    multipliers = made({"safe": 1.0})
    assert multipliers.weights().tolist() == pytest.approx([0.5, 0.5, 0.5])  # 1, 1, 1 over 1 + 1
    metrics = multipliers.update(rewards(0.5))  # a gap of 0.5, a quarter of the standard deviation
    assert metrics == {"multiplier/safe": pytest.approx(1.025), "floor_gap/safe": pytest.approx(0.5)}
    metrics = multipliers.update(rewards(-100.0))  # a gap counts as one standard deviation at most
    assert metrics == {"multiplier/safe": pytest.approx(1.125), "floor_gap/safe": pytest.approx(101.0)}
    expected = [1 / 2.125, 1.125 / 2.125, 1 / 2.125]
    assert multipliers.weights().tolist() == pytest.approx(expected)
    seen = [multipliers.update(rewards(50.0))["multiplier/safe"] for _ in range(14)]
    assert seen == sorted(seen, reverse=True) and seen[10] > 0 and seen[11:] == [0.0] * 3
    assert multipliers.update(rewards(50.0))["floor_gap/safe"] == 0
    assert multipliers.weights().tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("weight", [2.0, 0.0])
def test_with_direction_min_the_floor_is_a_ceiling(weight: float):
    given = {"help": 1.0, "safe": 1.0, "cost": weight}
    multipliers = made({"cost": 1.0}, weights=given, directions={"cost": "min"})
    before = multipliers.state["cost"]
    assert before == weight and multipliers.weights()[2].item() == pytest.approx(-weight / (1 + weight))
    metrics = multipliers.update(rewards(0.0, cost=2.0))
    assert metrics["multiplier/cost"] == pytest.approx(weight + 0.05)
    assert metrics["floor_gap/cost"] == pytest.approx(1.0)
    assert multipliers.weights()[2] < 0
    assert multipliers.update(rewards(0.0, cost=0.0))["multiplier/cost"] == pytest.approx(weight)


def test_missing_rewards_do_not_count():
    multipliers = made({"safe": 1.0, "cost": 0.0})
    values = rewards(0.5)
    values = torch.cat([values, torch.full((3, 3), NAN)])
    values[:, 2] = NAN
    assert multipliers.update(values) == {
        "multiplier/safe": pytest.approx(1.025),
        "floor_gap/safe": pytest.approx(0.5),
    }
    assert multipliers.state["cost"] == 1.0


def test_multipliers_go_into_a_checkpoint_and_come_back(tmp_path: Path):
    model = torch.nn.Linear(3, 2)
    optimizer = Optimizer(model.parameters(), lr=0.1)
    multipliers = made({"safe": 1.0, "cost": 3.0})
    multipliers.update(rewards(0.0))
    state.save(tmp_path, 4, model, optimizer, keep=1, carried={"multipliers": multipliers.state})
    again = made({"safe": 1.0, "cost": 3.0})
    assert again.state != multipliers.state
    assert state.restore(tmp_path, model, optimizer, {"multipliers": again.state}).step == 4
    assert again.state == multipliers.state and torch.equal(again.weights(), multipliers.weights())


REWARDS = """
def two(prompts, completions, **columns):
    return {
        "short": [-len(text) / 50 for text in completions],
        "vowels": [sum(letter in "aeiou" for letter in text) / 16 for text in completions],
    }
"""
RECIPE = """
[rollout]
prompts_per_step = 4
group_size = 4
max_new_tokens = 8

[data]
eval_size = 4

[reward]
functions = ["floor_rewards:two"]
floor_lr = 0.5

[reward.floors]
vowels = 0.9

[run]
steps = 5
save_every = 2
"""


def test_an_interrupted_run_goes_on_with_its_multipliers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "floor_rewards.py").write_text(REWARDS)
    (tmp_path / "floors.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    save_policy(tmp_path / "policy", "qwen2")
    write_prompts(tmp_path / "prompts.jsonl")

    def command(*flags: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(list(flags))
        return stop.value.code if isinstance(stop.value.code, int) else 0

    def metrics(name: str) -> list[dict]:
        return [reproducible(row) for row in read_rows(tmp_path / "runs" / name / "metrics.jsonl")]

    start = ("--config", "floors.toml", "--policy.model", "policy", "--data.prompts", "prompts.jsonl")
    assert command(*start, "--name", "straight") == 0
    moved = [row["multiplier/vowels"] for row in metrics("straight")]
    assert moved[0] > 1 and moved == sorted(moved) and len(set(moved)) == 5
    assert all(row["floor_gap/vowels"] > 0 for row in metrics("straight"))

    log = Run.step

    def interrupted(self, number, scalars):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, number, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupted)
        assert command(*start, "--name", "cut") == 130
    assert len(metrics("cut")) == 3
    assert command("--resume", "runs/cut") == 0
    assert metrics("cut") == metrics("straight")
