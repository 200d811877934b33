"""Settings that fit a limit: chosen, told, kept; and refused before anything is loaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import config_of

from grpo_fast import fit
from grpo_fast.config.command_line import parse
from grpo_fast.fit import fitted, models_of, work_of
from grpo_fast.memory.choose import GIB, as_asked, choose, refusal, smallest_estimate
from grpo_fast.memory.device import available_bytes
from grpo_fast.memory.estimate import Planner, Work
from grpo_fast.train import main
from tests.tiny import TINY_MINIATURE, save_policy, write_config, write_prompts

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def planner() -> Planner:
    """A run whose update, rollouts and scoring are of about the same size."""
    config = config_of("qwen2", **SHAPE)
    return Planner(
        Work(
            policy=config,
            reward_models=(config,),
            prompts=32,
            prompt_tokens=64,
            new_tokens=192,
            token_budget=8192,
            reference=True,
            reward_tokens=1024,
            prefill_tokens=512,
        )
    )


def limits(planner: Planner) -> list[int]:
    low, high = smallest_estimate(planner).peak, planner.estimate().peak
    return [low + (high - low) * step // 8 for step in range(9)]


def test_what_is_chosen_fits_and_grows_with_the_limit(planner: Planner):
    found = [choose(planner, limit) for limit in limits(planner)]
    assert all(choice is not None for choice in found)
    for limit, choice in zip(limits(planner), found, strict=True):
        assert choice is not None and choice.estimate.peak <= limit
        again = planner.estimate(
            token_budget=choice.token_budget,
            gradient_checkpointing=choice.gradient_checkpointing,
            max_rows=choice.max_rows,
        )
        assert again == choice.estimate
    for small, large in itertools.pairwise(choice for choice in found if choice):
        assert small.token_budget <= large.token_budget and small.max_rows <= large.max_rows
        assert small.gradient_checkpointing >= large.gradient_checkpointing
    assert found[-1] is not None and found[-1].flags(planner) == ""
    assert len({(c.token_budget, c.gradient_checkpointing) for c in found if c}) >= 4


def test_checkpointing_comes_after_smaller_budgets(planner: Planner):
    chosen = [choice for limit in limits(planner) if (choice := choose(planner, limit))]
    assert {c.token_budget for c in chosen if not c.gradient_checkpointing} >= {8192, 4096}
    assert all(c.token_budget <= 8192 // 4 for c in chosen if c.gradient_checkpointing)


def test_nothing_is_chosen_below_the_smallest(planner: Planner):
    assert choose(planner, smallest_estimate(planner).peak - 1) is None


def test_the_refusal_says_what_fits(planner: Planner):
    limit = (smallest_estimate(planner).peak + as_asked(planner).estimate.peak) // 2
    line = refusal(planner, limit, "the device")
    found = choose(planner, limit)
    assert found is not None and found.flags(planner) in line and "\n" not in line
    assert "--optim.token_budget" in line and "the device has" in line


def large(**changes: Any) -> Planner:
    shape: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 2, "vocab_size": 50_000}
    options: dict[str, Any] = {
        "prompts": 2,
        "prompt_tokens": 16,
        "new_tokens": 16,
        "token_budget": 256,
        "max_rows": 8,
    }
    config = config_of("llama", **shape)
    return Planner(Work(policy=config, device="cuda", dtype=torch.bfloat16, **(options | changes)))


def test_where_nothing_fits_the_next_step_is_named():
    planner = large(reference=True)
    smallest = smallest_estimate(planner)
    just_short = refusal(planner, smallest.peak - smallest.reference // 2, "the device")
    assert "most of it optimizer" in just_short and "--loss.kl_coef 0" in just_short
    assert "adamw8bit" in refusal(planner, smallest.peak - smallest.optimizer // 2, "the device")
    assert "adafactor" in refusal(planner, smallest.peak - 68 * smallest.optimizer // 100, "the device")
    assert "--policy.lora_rank 16" in refusal(planner, 3 * smallest.parameters, "the device")
    assert "smaller model" in refusal(planner, smallest.parameters // 2, "the device")


def test_a_cuda_free_machine_tells_its_memory():
    found = available_bytes(torch.device("cpu"))
    assert 2**28 < found < 2**50


def asked(*flags: str | Path, recipe: Path):
    return parse([str(flag) for flag in ("--config", recipe, *flags)]).config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text = TINY_MINIATURE.replace("steps = 6", "steps = 1").replace(
        "max_new_tokens = 16", "max_new_tokens = 24"
    )
    return write_config(tmp_path / "tiny.toml", text.replace("prompts_per_step = 4", "prompts_per_step = 32"))


def between(config) -> float:
    """A limit in GiB that the settings pass, and smaller ones keep."""
    planner = Planner(work_of(config, models_of(config)))
    return (2 * planner.estimate().peak + smallest_estimate(planner).peak) / 3 / GIB


def test_a_limit_changes_the_settings_and_says_so(recipe: Path, capsys):
    config = asked("--device", "cpu", recipe=recipe)
    limit = between(config)
    tight = asked("--device", "cpu", "--memory.limit_gib", str(limit), recipe=recipe)
    found = fitted(tight)
    assert found.optim.token_budget < config.optim.token_budget
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and f"--optim.token_budget {found.optim.token_budget}" in line
    assert Planner(work_of(found, models_of(found))).estimate().peak <= limit * GIB
    assert fitted(found) == found and capsys.readouterr().out == ""
    assert fitted(config) is config


def run_command(*flags: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    return stop.value.code if isinstance(stop.value.code, int) else 0


def test_the_runs_config_holds_the_choice_and_a_resumed_run_keeps_it(recipe: Path, tmp_path: Path):
    limit = str(between(asked("--device", "cpu", recipe=recipe)))
    flags = ("--config", recipe, "--output-dir", tmp_path, "--name", "run", "--device", "cpu")
    assert run_command(*flags, "--memory.limit_gib", limit) == 0
    written = parse(["--config", str(tmp_path / "run" / "config.toml")]).config
    expected = fitted(asked("--device", "cpu", "--memory.limit_gib", limit, recipe=recipe))
    assert written.optim == expected.optim and written.policy == expected.policy

    assert run_command("--resume", tmp_path / "run", "--run.steps", "2") == 0
    again = parse(["--config", str(tmp_path / "run" / "config.toml")]).config
    assert again.optim == written.optim and again.rollout == written.rollout
    assert run_command("--resume", tmp_path / "run", "--run.steps", "3", "--memory.limit_gib", "0.01") == 2


def test_a_device_that_is_too_small_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch, capsys):
    model = save_policy(tmp_path / "model", "qwen2", max_position_embeddings=4096)
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    flags = ["--policy.model", model, "--data.prompts", prompts, "--reward.functions", "nowhere:function"]
    flags += ["--output-dir", tmp_path, "--device", "cpu", "--data.max_prompt_tokens", 64]
    flags += ["--rollout.max_new_tokens", 64, "--optim.token_budget", 1024, "--data.eval_size", 8]
    config = parse([str(flag) for flag in flags]).config
    planner = Planner(work_of(config, models_of(config)))
    limit = (planner.estimate().peak + smallest_estimate(planner).peak) // 2
    monkeypatch.setattr(fit, "available_bytes", lambda device: limit)
    capsys.readouterr()  # what saving the model said
    assert run_command(*flags) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: these settings need") and line.count("\n") == 1
    assert "this fits" in line and (" --rollout." in line or " --optim." in line)
    monkeypatch.setattr(fit, "available_bytes", lambda device: 2**28)
    assert run_command(*flags, "--dry-run") == 2
    assert "the least of budget, checkpointing and rows needs" in capsys.readouterr().err
