"""What makes a large run fit, through the whole command: who holds the device when, and runs that go on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast import train as training
from grpo_fast.engines.local import LocalEngine
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.run.metrics import read_rows
from grpo_fast.run.progress import Progress
from tests.test_train import REWARDS, metrics, own_model_flags, run_command


@pytest.fixture
def flags(tmp_path, monkeypatch) -> list[str]:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_rewards", None)
    shape = {"hidden_size": 128, "intermediate_size": 256}  # whole blocks for 4 and for 8 bits
    return [*own_model_flags(tmp_path, "qwen2", **shape), "--data.eval-size", "4", "--run.eval-every", "1"]


def test_engine_and_optimizer_take_turns(flags, monkeypatch):
    """Everything that generates finds the optimizer's states away, and the update finds them back."""
    calls: list[str] = []

    def spy(owner: type, name: str) -> None:
        inner = getattr(owner, name)

        def recorded(self, *args, **kwargs):
            calls.append(name)
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    for owner, names in ((LocalEngine, "generate push sleep wake"), (Optimizer, "offload reload state_dict")):
        for name in names.split():
            spy(owner, name)
    update = training.update
    monkeypatch.setattr(training, "update", lambda *a, **k: calls.append("update") or update(*a, **k))
    assert run_command(*flags, "--run.steps", "2", "--run.save-every", "1") == 0
    step = ["generate", "reload", "update", "reload", "offload"]  # the optimizer's `step` reloads too
    first = ["offload", "push", "generate", *step, "push", "generate", "state_dict"]
    assert calls == [*first, *step, "state_dict", "push", "generate", "sleep"]


def test_states_that_leave_between_rollouts_change_no_metric_and_can_be_saved_there(
    flags, tmp_path, monkeypatch
):
    """On the CPU the setting is refused, so the optimizer is asked for it directly."""
    flags = [*flags, "--dtype", "bfloat16", "--run.save-every", "2", "--run.eval-every", "0"]
    assert run_command(*flags, "--run.steps", "4", "--name", "plain") == 0
    away = []

    class Moving(Optimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"where": "while_training"})

        def offload(self):
            super().offload()
            away.append(sum(master.untyped_storage().nbytes() for master in self.masters))

    monkeypatch.setattr(training, "Optimizer", Moving)
    assert run_command(*flags, "--run.steps", "2", "--name", "moving") == 0
    assert run_command("--resume", tmp_path / "moving", "--run.steps", "4") == 0
    assert set(away) == {0}
    assert metrics(tmp_path / "moving") == metrics(tmp_path / "plain")


def test_out_of_memory_is_counted_told_and_survived(flags, tmp_path, monkeypatch):
    wanted_flags = [*flags, "--run.steps", "2", "--name", "plain"]
    assert run_command(*wanted_flags) == 0
    forward, calls, told = Policy.forward, [], []

    def failing(self, batch, *args, **kwargs):
        calls.append(batch)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch, *args, **kwargs)

    monkeypatch.setattr(Policy, "forward", failing)
    message = Progress.message
    monkeypatch.setattr(Progress, "message", lambda self, text: told.append(text) or message(self, text))
    assert run_command(*flags, "--run.steps", "2") == 0
    plain, found = (
        [r for r in metrics(tmp_path / name) if r["phase"] == "grpo"] for name in ("plain", "run")
    )
    assert [row["oom_retries"] for row in found] == [1, 0]
    assert found[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4)
    assert sum("--optim.token-budget" in line for line in told) == 1


def test_8_bit_states_go_on_where_they_stopped(flags, tmp_path):
    pytest.importorskip("torchao", reason="the optional extra lowbit")
    flags = [*flags, "--optim.optimizer", "adamw8bit", "--run.save-every", "2", "--run.eval-every", "0"]
    assert run_command(*flags, "--run.steps", "4", "--name", "straight") == 0
    assert run_command(*flags, "--run.steps", "2", "--name", "cut") == 0
    assert run_command("--resume", tmp_path / "cut", "--run.steps", "4") == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "straight")
    saved = tmp_path / "cut" / "checkpoints" / "step-000004"
    assert b"exp_avg:codes" in (saved / "optimizer.safetensors").read_bytes()


def test_an_adapter_over_4_bits_learns_and_is_merged(flags, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the optional extra lowbit")
    from transformers import AutoModelForCausalLM

    asked = (
        "--policy.quantize nf4 --policy.lora-rank 4 --policy.merge-on-save --run.eval-every 0 --run.steps 40"
    )
    assert run_command(*flags, *asked.split()) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "grpo"]
    first, last = (sum(row["reward/counts_e"] for row in part) for part in (rows[:8], rows[-8:]))
    assert last > first
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 40
    loaded: Any = AutoModelForCausalLM.from_pretrained(Path("run/model"), output_loading_info=True)
    merged, info = loaded
    assert not info["missing_keys"] and not hasattr(merged.config, "quantization_config")
