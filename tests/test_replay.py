"""A step whose loss or gradient is not finite moves no weight, is kept, and comes out the same when replayed."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from grpo_fast import rollout as rollout_module
from grpo_fast.config.settings import OptimSettings, PolicySettings, RunSettings
from grpo_fast.dumps import Dumps
from grpo_fast.grpo import update
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.models.sharded import full as whole
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.parallel.world import World
from grpo_fast.replay import main
from grpo_fast.run import checkpoint
from grpo_fast.run.metrics import read_rows
from grpo_fast.task import lora_settings
from grpo_fast.train import main as train
from tests.grpo_cases import config, policy, rollout
from tests.ranks import run_on_ranks
from tests.tiny import TINY_MINIATURE, write_config

FORWARD = Policy.forward


def exit_code(command, *argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        command([str(word) for word in argv])
    return stop.value.code if isinstance(stop.value.code, int) else 0


def skipped_step(run: Path, settings, *, poison: str = "", lora: LoraSettings | None = None):
    """One update of a policy saved as a run's start; (its weights before, after, metrics, lines, dump)."""
    policy().save(run / "start")
    model = policy(lora=lora)
    for name, parameter in model.model.named_parameters():
        if name == poison:
            parameter.data.flatten()[3] = torch.inf
    told: list[str] = []
    before = copy.deepcopy(model.state_dict())
    optimizer = Optimizer(model.trainable_parameters(), lr=1e-2)
    dumps = Dumps(run, settings, model, tell=told.append)
    metrics = update(
        model, optimizer, rollout(), settings, lr=1e-2, on_skip=lambda skipped: dumps.write(7, skipped)
    )
    same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return same, optimizer, metrics, told, run / "dumps" / "step-000007"


def poisoned_loss(self, batch, *args, **given):
    """The gradient stays finite, the loss does not."""
    loss, metrics = FORWARD(self, batch, *args, **given)
    return loss + (torch.inf if 3 in batch.sequence_index.tolist() else 0.0), metrics


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_a_weight_that_is_not_finite_skips_the_step_and_its_replay_finds_it(
    tmp_path: Path, capsys, preset: str
):
    bad = "model.layers.1.mlp.down_proj.weight"
    settings = config(preset, 64)
    same, optimizer, metrics, told, dump = skipped_step(tmp_path, settings, poison=bad)
    assert same and metrics["skipped_updates"] == optimizer.skipped_steps == 1
    assert "no weight has moved" in told[0] and str(dump) in told[1]
    assert {path.suffix for path in dump.iterdir()} == {".safetensors", ".json"}
    facts = json.loads((dump / "state.json").read_text())["dump"]
    assert bad in facts["nonfinite_parameters"] and facts["first_nonfinite_micro_batch"] == 1
    assert exit_code(main, dump) == 0
    out = capsys.readouterr().out
    assert "first module with an output that is not finite: model.layers.1.mlp.down_proj" in out
    assert "1 weights" in out and "reproduced: the same losses to the bit" in out
    for flags in (["--dtype", "bfloat16"], ["--micro-batch", "2"], ["--anomaly", "--device", "cpu"]):
        assert exit_code(main, dump, *flags) == 0, flags
    assert "anomaly: Function" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_skips_the_step_though_the_gradient_is(tmp_path: Path, capsys, monkeypatch):
    settings = config("dapo", 64)
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "forward", poisoned_loss)
        same, _, metrics, _, dump = skipped_step(tmp_path, settings)
        assert same and metrics["skipped_updates"] == 1 and metrics["grad_norm"] < 1e6
        assert exit_code(main, dump) == 0
    facts = json.loads((dump / "state.json").read_text())["dump"]
    assert facts["loss"] == "inf" and facts["nonfinite_parameters"] == {}
    assert facts["first_nonfinite_micro_batch"] > 1
    assert exit_code(main, dump) == 1  # the cause is not in the batch
    assert "NOT reproduced" in capsys.readouterr().out


def test_one_bad_minibatch_costs_only_itself_and_old_logprobs_are_kept(tmp_path: Path, capsys, monkeypatch):
    settings = replace(config("dapo"), optim=OptimSettings(minibatches=3))
    monkeypatch.setattr(Policy, "forward", poisoned_loss)
    same, optimizer, metrics, _, dump = skipped_step(tmp_path, settings)
    assert not same and metrics["skipped_updates"] == 1
    assert optimizer.inner.state_dict()["state"][0]["step"] == 2
    groups, _ = checkpoint.load(dump)
    assert len(groups["batch"]["old_logprobs"]) == groups["batch"]["completion_lengths"].sum() > 0
    assert groups["batch"]["sequence"].tolist() == [0, 1, 2, 3]
    assert exit_code(main, dump) == 0
    out = capsys.readouterr().out
    assert out.count("\n") > 10 and "'" in out


def test_adapters_are_kept_and_put_on_the_model_they_belong_to(tmp_path: Path, capsys):
    settings = replace(config("grpo", 64), policy=PolicySettings(lora_rank=4))
    bad = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    same, *_, dump = skipped_step(tmp_path, settings, poison=bad, lora=lora_settings(settings))
    assert same and exit_code(main, dump) == 0
    groups, _ = checkpoint.load(dump)
    assert all("lora_" in name for name in groups["model"]) and "ref_logprobs" in groups["batch"]
    assert "reproduced" in capsys.readouterr().out


def skipped_on_ranks(world: World, run: Path) -> tuple[float, list[str], bool]:
    """The same with the policy shared out."""
    settings = replace(config("dapo", 40), optim=OptimSettings(token_budget=40, minibatches=2))
    model = policy(family="llama")
    if world.is_first:
        model.save(run / "start")
    model.model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = torch.inf
    model.shard(world)
    told: list[str] = []
    optimizer = Optimizer(model.trainable_parameters(), lr=1e-2)
    dumps = Dumps(run, settings, model, tell=told.append)
    before = [whole(parameter).clone() for parameter in model.trainable_parameters()]
    write = partial(dumps.write, 7)
    metrics = update(model, optimizer, rollout(), settings, lr=1e-2, on_skip=write)
    after = [whole(parameter) for parameter in model.trainable_parameters()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return metrics["skipped_updates"], told, same


def test_several_processes_skip_together_and_one_replays_what_they_did(tmp_path: Path, capsys):
    (skipped, told, same), (others, _, _) = run_on_ranks(2, skipped_on_ranks, tmp_path)
    assert skipped == others == 2 and same
    assert "not finite in" in told[0] and told[1].startswith("replay: ")
    dump = tmp_path / "dumps" / "step-000007"
    groups, state = checkpoint.load(dump)
    assert state["dump"]["processes"] == 2
    assert len(groups["batch"]["old_logprobs"]) == groups["batch"]["completion_lengths"].sum()
    assert exit_code(main, dump) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_no_more_dumps_than_asked_for_and_none_where_the_disk_is_full(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Policy, "forward", poisoned_loss)
    none = replace(config("dapo"), run=RunSettings(max_dumps=0))
    assert not skipped_step(tmp_path / "none", none)[-1].exists()
    full = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("grpo_fast.dumps.shutil.disk_usage", lambda _: full)
        *_, told, dump = skipped_step(tmp_path / "full", config("dapo"))
    assert not dump.exists() and "MiB are free" in told[1]
    gone = checkpoint.save(tmp_path / "gone", 1, {"model": {"a": torch.zeros(2)}}, {"step": 1})
    with monkeypatch.context() as patch:  # cleared away between the look at the folder and that at its files
        patch.setattr(checkpoint, "latest", lambda _: gone.with_name("step-000000"))
        *_, dump = skipped_step(tmp_path / "gone", config("dapo"))
    assert dump.exists()
    three = tmp_path / "three" / "dumps"
    for step in (1, 2, 3):
        (three / f"step-00000{step}").mkdir(parents=True)
    *_, told, dump = skipped_step(tmp_path / "three", config("dapo"))
    assert not dump.exists() and "3 dumps (run.max_dumps)" in told[1]


def test_a_dump_that_is_damaged_or_none_is_one_line(tmp_path: Path, capsys, monkeypatch):
    assert exit_code(main, tmp_path) == 2
    checkpoint.save(tmp_path, 3, {"model": {"a": torch.zeros(2)}}, {"step": 3})
    assert exit_code(main, tmp_path / "checkpoints" / "step-000003") == 2
    monkeypatch.setattr(Policy, "forward", poisoned_loss)
    *_, dump = skipped_step(tmp_path, config("dapo"))
    assert exit_code(main, dump, "--micro-batch", "9") == 2
    assert exit_code(main, dump, "--model", str(tmp_path / "nowhere")) == 2
    groups, state = checkpoint.load(dump)
    for name, value in (("completion_lengths", torch.tensor([-1])), ("prompt_of", torch.full((12,), 99))):
        broken = {**groups, "batch": {**groups["batch"], name: value}}
        path = checkpoint.save(tmp_path / "broken", 1, broken, state, kind="dumps")
        assert exit_code(main, path, "--model", tmp_path / "start") == 2, name
    crowd = {**state, "dump": {**state["dump"], "processes": 2**39}}
    path = checkpoint.save(tmp_path / "crowd", 1, groups, crowd, kind="dumps")
    assert exit_code(main, path, "--model", tmp_path / "start") == 2
    with (dump / "batch.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert exit_code(main, dump) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8 and all(line.startswith("error: ") for line in lines)


def test_a_run_goes_on_over_skipped_steps_and_stops_after_too_many(tmp_path: Path, monkeypatch, capsys):
    recipe = write_config(
        tmp_path / "tiny.toml",
        TINY_MINIATURE + "max_dumps = 1\n[limits]\nskipped = 2\n[loss]\nkl_coef = 0.0\n",
    )
    compare, calls = rollout_module.group_advantages, []

    def sometimes(*args, **given):
        advantages = compare(*args, **given)
        calls.append(1)
        if len(calls) in (2, 4, 5):
            advantages[3] = torch.nan
        return advantages

    monkeypatch.setattr(rollout_module, "group_advantages", sometimes)
    assert exit_code(train, "--config", recipe, "--output-dir", tmp_path, "--name", "run") == 2
    run, output = tmp_path / "run", capsys.readouterr()
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["phase"] == "grpo"]
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 1, 1]
    assert rows[1]["warning/limit_skipped"] == 1.0 and rows[4]["over/skipped"] == 2.0
    assert rows[1]["loss"] is None
    assert "for 2 steps in a row" in output.err and "5 steps are kept, go on with --resume" in output.err
    assert [path.name for path in (run / "dumps").iterdir()] == ["step-000002"]
    groups = [checkpoint.load(run / "checkpoints" / f"step-00000{step}")[0] for step in (4, 5)]
    assert all(torch.equal(value, groups[1]["model"][name]) for name, value in groups[0]["model"].items())
    assert "limits.skipped is passed, from here on in 3 steps" in (run / "report.html").read_text()
    assert exit_code(main, run / "dumps" / "step-000002") == 0
    assert "nan" in capsys.readouterr().out
