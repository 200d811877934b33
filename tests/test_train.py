"""The command end to end: a whole run, the same run again, and one that was interrupted."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from grpo_fast import train
from grpo_fast.run import checkpoint
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import read_rows, reproducible
from grpo_fast.state import Steps
from grpo_fast.train import main
from tests.ranks import Forked
from tests.tiny import TINY_MINIATURE, save_policy, write_config, write_prompts

REWARDS = '''
def counts_e(prompts, completions, **columns):
    """Prefers one letter: what a policy can learn in a few steps."""
    return [sum(letter == "e" for letter in text) / 16 for text in completions]

def two(prompts, completions, **columns):
    return {"short": [-len(text) / 50 for text in completions], "vowels": counts_e(prompts, completions)}
'''


def run_command(*flags: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    return stop.value.code if isinstance(stop.value.code, int) else 0


def metrics(run: Path) -> list[dict]:
    return [reproducible(row) for row in read_rows(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    recipe = write_config(folder / "tiny.toml")
    assert run_command("--config", recipe, "--output-dir", folder, "--name", "straight") == 0
    return folder / "straight"


def test_a_run_leaves_everything_the_design_names(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert {"config.toml", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "model"} <= names
    assert list((tiny_run / "tensorboard").rglob("events.*"))
    assert sorted(path.name for path in (tiny_run / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000006",
    ]
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 6 and summary["prompts"] == 12
    assert {"warm_start", "reward_model", "generate", "reward", "update", "evaluate"} <= set(
        summary["phase_s"]
    )
    assert summary["wall_s"] > 0 and summary["tokens_per_s"] > 0 and summary["peak_memory_gib"] > 0
    for name in ("safety", "politeness", "meaningfulness", "actionability"):
        entry = summary["objectives"][name]
        for key in ("reward_before", "reward_after", "judge_before", "judge_after", "judge_change"):
            low, high = entry[key]["ci95"]
            assert low <= entry[key]["mean"] <= high
        assert {"mae", "pearson", "spearman", "n"} <= set(summary["reward_model"][name])
    phases = [row["phase"] for row in read_rows(tiny_run / "metrics.jsonl")]
    assert (
        phases == sorted(phases, key=["warm_start", "reward_model", "grpo"].index)
        and phases.count("grpo") == 6
    )
    when = [row["when"] for row in read_rows(tiny_run / "samples.jsonl")]
    assert when == ["before"] * 3 + ["after"] * 3


def test_the_model_loads_in_transformers(tiny_run):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "model")
    text = "how do i draw a map"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.vocab_size == len(tokenizer)
    heads = AutoModelForSequenceClassification.from_pretrained(tiny_run / "reward_model").config.id2label
    assert list(heads.values()) == ["safety", "politeness", "meaningfulness", "actionability"]


def test_the_same_seed_gives_the_same_metrics(tiny_run, tmp_path):
    recipe = write_config(tmp_path / "tiny.toml")
    assert run_command("--config", recipe, "--output-dir", tmp_path, "--name", "again") == 0
    assert metrics(tmp_path / "again") == metrics(tiny_run)
    assert run_command("--config", recipe, "--output-dir", tmp_path, "--name", "other", "--seed", "1") == 0
    assert metrics(tmp_path / "other") != metrics(tiny_run)


@pytest.mark.parametrize(("phase", "step"), [("warm_start", 2), ("reward_model", 1), ("grpo", 3)])
def test_an_interrupted_run_goes_on_to_the_same_metrics(tiny_run, tmp_path, monkeypatch, phase, step):
    recipe = write_config(tmp_path / "tiny.toml")
    log = Run.step

    def interrupted(self, number, scalars):
        if (self._phase, number) == (phase, step):
            os.kill(os.getpid(), signal.SIGINT)
        log(self, number, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupted)
        assert run_command("--config", recipe, "--output-dir", tmp_path, "--name", "cut") == 130
    run = tmp_path / "cut"
    assert metrics(run)[-1]["phase"] == phase and metrics(run)[-1]["step"] == step
    assert run_command("--resume", run) == 0
    assert metrics(run) == metrics(tiny_run)
    assert read_rows(run / "samples.jsonl") == read_rows(tiny_run / "samples.jsonl")
    ours, theirs = (json.loads((path / "summary.json").read_text())["objectives"] for path in (run, tiny_run))
    assert ours == theirs


def test_a_signal_between_saving_and_stopping_loses_no_step(tmp_path, monkeypatch):
    recipe = write_config(tmp_path / "tiny.toml")
    finish = Steps.finish

    def finished(self, **given):
        finish(self, **given)
        if self.done == 1:  # not saved: every second step is
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Steps, "finish", finished)
    assert run_command("--config", recipe, "--output-dir", tmp_path, "--name", "late") == 130
    newest = checkpoint.latest(tmp_path / "late")
    assert newest is not None and newest.name == f"step-{metrics(tmp_path / 'late')[-1]['step']:06d}"


def test_a_signal_in_the_first_evaluation_stops_before_a_step(tmp_path, monkeypatch):
    recipe = write_config(tmp_path / "tiny.toml")
    begin = train.save_evaluation

    def saved(*arguments):
        begin(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_evaluation", saved)
        assert run_command("--config", recipe, "--output-dir", tmp_path, "--name", "early") == 130
    assert all(row["phase"] != "grpo" for row in metrics(tmp_path / "early"))
    assert (tmp_path / "early" / "evaluation_before.json").is_file()


def test_sigterm_from_outside_saves_and_exits_130(tmp_path):
    recipe = write_config(tmp_path / "tiny.toml", TINY_MINIATURE.replace("steps = 6", "steps = 5000"))
    flags = ["--config", recipe, "--output-dir", tmp_path, "--name", "t"]
    process = Forked(main, flags, tmp_path / "said.txt", folder=tmp_path)
    deadline = time.time() + 120
    while time.time() < deadline:
        rows = read_rows(tmp_path / "t" / "metrics.jsonl")
        if rows and rows[-1]["phase"] == "grpo":
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, output = process.wait(60), (tmp_path / "said.txt").read_text()
    assert code == 130, output
    assert "stopped; go on with: python -m grpo_fast.train --resume" in output
    last = read_rows(tmp_path / "t" / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "t" / "checkpoints" / f"step-{last:06d}").is_dir()
    assert (tmp_path / "t" / "report.html").is_file()


@pytest.fixture
def rewards(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_rewards", None)
    return tmp_path


def own_model_flags(folder: Path, family: str, **overrides) -> list[str]:
    policy = save_policy(folder / family, family, **overrides)
    flags = f"--policy.model {policy} --data.prompts {write_prompts(folder / 'prompts.jsonl')} --data.eval-size 16"
    flags += " --reward.functions my_rewards:counts_e --rollout.prompts-per-step 4 --rollout.group-size 8"
    flags += f" --rollout.max-new-tokens 12 --optim.lr 1e-2 --run.steps 48 --output-dir {folder} --name run"
    return flags.split()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_another_architecture_learns_from_a_python_reward(rewards, family, loss):
    assert run_command(*own_model_flags(rewards, family), "--loss.preset", loss) == 0
    objective = json.loads((rewards / "run" / "summary.json").read_text())["objectives"]["counts_e"]
    assert objective["reward_change"]["ci95"][0] > 0, objective


def test_lora_trains_the_adapter_alone_and_peft_loads_it(rewards):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    flags = own_model_flags(rewards, "llama", initializer_range=0.2)  # a frozen head of usual size
    assert run_command(*flags, "--policy.lora-rank", "4") == 0
    run = rewards / "run"
    objective = json.loads((run / "summary.json").read_text())["objectives"]["counts_e"]
    assert objective["reward_change"]["ci95"][0] > 0, objective
    saved = load_file(next((run / "checkpoints").iterdir()) / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    base = AutoModelForCausalLM.from_pretrained(rewards / "llama")
    adapted = PeftModel.from_pretrained(base, run / "model")
    ids = torch.arange(5, 15)[None]
    with adapted.disable_adapter():
        plain = adapted(ids).logits
    assert not torch.allclose(adapted(ids).logits, plain)


def test_lora_too_gives_the_same_metrics_for_the_same_seed(rewards):
    flags = [*own_model_flags(rewards, "llama"), "--policy.lora-rank", "4", "--run.steps", "3"]
    found = []
    for name in ("one", "two"):
        torch.rand(3)  # whatever was drawn before must not matter
        assert run_command(*flags, "--name", name) == 0
        found.append(metrics(rewards / name))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "flags",
    [
        "--optim.updates-per-rollout 2 --optim.minibatches 2 --loss.preset dapo",
        "--loss.preset gspo --dtype bfloat16 --policy.gradient-checkpointing",
        "--loss.preset cispo --advantage.mode dvao --optim.token-budget 64",
        "--loss.preset dr_grpo --optim.optimizer adafactor",
        "--loss.preset grpo --loss.entropy-coef 0.01 --loss.mask-truncated",
        "--rollout.top-k 20 --loss.mismatch truncate --loss.mismatch-high 2",
    ],
)
def test_options_run_through(rewards, flags):
    base = own_model_flags(rewards, "qwen2")
    base[base.index("my_rewards:counts_e")] = "my_rewards:two"
    base[base.index("48")] = "2"
    assert run_command(*base, *flags.split()) == 0
    rows = [row for row in metrics(rewards / "run") if row["phase"] == "grpo"]
    assert len(rows) == 2 and all(row["grad_norm"] is not None for row in rows)
    assert {"reward/short", "reward/vowels"} <= set(rows[0])


def test_a_dry_run_prints_the_plan_and_leaves_nothing(rewards, capsys):
    assert run_command(*own_model_flags(rewards, "llama"), "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "4 prompts × 8 completions = 32" in shown and "GiB" in shown and "counts_e × 1" in shown
    assert not (rewards / "run").exists()


def test_a_reward_function_that_fails_late_costs_no_step(rewards, capsys):
    (rewards / "late_rewards.py").write_text(
        "calls = 0\n"
        "def late(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls > 5:\n"
        "        raise RuntimeError('gone')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    flags = own_model_flags(rewards, "qwen2")
    flags[flags.index("my_rewards:counts_e")] = "late_rewards:late"
    assert run_command(*flags) == 2
    assert "--resume" in capsys.readouterr().err
    assert (rewards / "run" / "checkpoints" / "step-000003").is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rollout.max-new-tokens 8000", "256 positions"),
        ("--rollout.prompts-per-step 17", "only 16 prompts to train on"),
        ("--rollout.stop-tokens nosuchtoken", "'nosuchtoken' is not one token"),
        ("--data.max-prompt-tokens 2", "more than data.max_prompt_tokens = 2"),
        ("--policy.attention flash", "policy.attention = flash: flash-attn 4 needs cuda"),
        ("--policy.model no-such-model", "no-such-model: no such folder here"),
        ("--reward.functions my_rewards:no_such", "my_rewards has no no_such"),
        ("--reward.functions my_rewards:takes_nothing", "must take completions"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_no_folder(rewards, capsys, flags, message):
    path = rewards / "my_rewards.py"
    path.write_text(path.read_text() + "\ndef takes_nothing():\n    return []\n")
    base = own_model_flags(rewards, "qwen2")
    base[base.index("--output-dir") + 1] = str(rewards / "runs")
    capsys.readouterr()
    assert run_command(*base, *flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (rewards / "runs").exists()


def test_a_finished_run_is_not_resumed_without_more_steps(tiny_run, capsys):
    before = {path: path.read_bytes() for path in tiny_run.glob("*.json*")}
    assert run_command("--resume", tiny_run) == 2
    assert "is finished, 6 steps of 6" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tiny_run.glob("*.json*")} == before


def test_a_reward_function_that_fails_in_an_evaluation_costs_no_step(rewards, capsys):
    (rewards / "eval_rewards.py").write_text(
        "sizes = []\n"
        "def fails(completions, **columns):\n"
        "    sizes.append(len(completions))\n"
        "    if sizes.count(16) == 2:\n"  # 16 held-out prompts: the second evaluation
        "        raise RuntimeError('gone')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    flags = own_model_flags(rewards, "qwen2")
    flags[flags.index("my_rewards:counts_e")] = "eval_rewards:fails"
    assert run_command(*flags, "--run.eval-every", "3", "--run.steps", "5") == 2
    assert "3 steps are kept, go on with --resume" in capsys.readouterr().err
    assert [row["step"] for row in metrics(rewards / "run")] == [1, 2, 3]
    (rewards / "eval_rewards.py").write_text(
        "def fails(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )  # mended
    assert run_command("--resume", rewards / "run") == 0
    assert [row["step"] for row in metrics(rewards / "run")] == [1, 2, 3, 4, 5]


def test_functions_see_the_same_kind_of_prompt_when_tried_and_in_training(rewards):
    (rewards / "seen.py").write_text(
        "seen = []\n"
        "def look(prompts, completions, messages):\n"
        "    seen.append((prompts, messages))\n"
        "    return [0.0] * len(prompts)\n"
    )
    flags = own_model_flags(rewards, "qwen2")
    flags[flags.index("my_rewards:counts_e")] = "seen:look"
    assert (
        run_command(
            *flags, "--data.system-prompt", "be kind", "--run.steps", "1", "--reward.isolation", "thread"
        )
        == 0
    )
    calls = sys.modules["seen"].seen
    assert len(calls) == 4  # tried, before, one step, after
    for prompts, messages in calls:
        assert all(prompt.startswith("tell me about the number ") for prompt in prompts)
        for prompt, chat in zip(prompts, messages, strict=True):
            assert [m["role"] for m in chat] == ["system", "user"]
            assert chat[1]["content"] == prompt


@pytest.mark.parametrize("when", ["start", "reward_model", "model"])
def test_a_full_disk_while_a_model_is_written(tiny_run, tmp_path, monkeypatch, capsys, when):
    recipe = write_config(tmp_path / "tiny.toml")
    rename = Path.rename

    def full(self, target):
        if Path(target).name == when and ".tmp-" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        assert run_command("--config", recipe, "--output-dir", tmp_path, "--name", "full") == 2
    error = capsys.readouterr().err
    assert f"cannot write the model to {tmp_path / 'full' / when}: No space left on device" in error
    assert error.count("\n") == 1
    run = tmp_path / "full"
    assert not (run / when).exists() and not list(run.glob(".*tmp*"))
    assert run_command("--resume", run) == 0
    assert metrics(run) == metrics(tiny_run)


def test_a_refused_resume_changes_nothing(tiny_run, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    (run / "evaluation_before.json").write_text('{"na')
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run_command("--resume", run, "--run.steps", "8") == 2
    error = capsys.readouterr().err
    assert "evaluation_before.json is damaged" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_more_steps_of_a_finished_run_are_written_down(tiny_run, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    assert run_command("--resume", run, "--run.steps", "7") == 0
    assert metrics(run)[: len(metrics(tiny_run))] == metrics(tiny_run)
    assert metrics(run)[-1]["step"] == 7
    assert "steps = 7" in (run / "config.toml").read_text()
    assert json.loads((run / "summary.json").read_text())["steps"] == 7


def test_completions_of_each_evaluation_are_kept(tmp_path):
    recipe = write_config(tmp_path / "tiny.toml", TINY_MINIATURE.replace("save_every = 2", "eval_every = 2"))
    assert run_command("--config", recipe, "--output-dir", tmp_path, "--name", "r", "--run.steps", "4") == 0
    kept = [(row["when"], row["step"]) for row in read_rows(tmp_path / "r" / "samples.jsonl")]
    assert kept == [("before", 0)] * 3 + [("step", 2)] * 3 + [("after", 4)] * 3
