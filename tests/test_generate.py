"""Talking to a trained model: the same prompts as in training, and one line when it cannot be done."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from grpo_fast.config.settings import RolloutSettings, TrainConfig
from grpo_fast.config.toml import to_toml
from grpo_fast.generate import Speaker, main
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.run.command import run_command
from tests.tiny import causal_lm, save_policy

ROLLOUT = RolloutSettings(max_new_tokens=8, temperature=1.0)


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main([str(argument) for argument in arguments]))
    return stopped.value.code if isinstance(stopped.value.code, int) else 1


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with a model, and a reward model of two heads, both with random weights."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    save_policy(run / "model", "qwen2")
    torch.manual_seed(1)
    policy = Policy.load(run / "model")
    config = causal_lm("qwen2", len(policy.tokenizer)).config
    config.pad_token_id = policy.tokenizer.pad_token_id
    layout = Layout(heads=(Head(name="safety"), Head(name="tone")))
    RewardModel.from_config(config, policy.tokenizer, layout).save(run / "reward_model")
    (run / "config.toml").write_text(to_toml(TrainConfig(rollout=ROLLOUT)))
    return run


def test_the_same_seed_gives_the_same_answers_whatever_else_is_asked(run, capsys):
    assert command(run, "how do i draw a map", "--samples", 2) == 0
    alone = capsys.readouterr().out
    assert alone.count("safety ") == 2 and alone.count("tone ") == 2
    assert command(run, "how do i bake bread", "how do i draw a map", "--samples", 2) == 0
    both = capsys.readouterr().out
    assert both.startswith("› how do i bake bread\n") and both.endswith("› how do i draw a map\n" + alone)
    assert command(run, "how do i draw a map", "--samples", 2, "--seed", 1) == 0
    assert capsys.readouterr().out != alone


def test_scores_are_those_of_the_reward_model(run):
    [answer] = Speaker(run).answer("how do i draw a map", temperature=0)
    assert answer.tokens <= 8 and answer.cut == (answer.tokens == 8)
    rewards = RewardModel.load(run / "reward_model")
    asked: list = [[{"role": "user", "content": "how do i draw a map"}]]
    expected = rewards.scores(asked, [answer.text])[0].tolist()
    assert list(answer.scores.values()) == pytest.approx(expected, abs=1e-5)


def test_the_chat_template_is_applied_as_in_training(run):
    prompt = "how do i draw a map"
    chat, plain = (Speaker(run, chat=chat).answer(prompt, samples=4) for chat in (True, False))
    assert Speaker(run).chat
    assert [a.text for a in chat] == [a.text for a in Speaker(run).answer(prompt, samples=4)]
    assert [a.text for a in chat] != [a.text for a in plain]
    written = "<|user|>how do i draw a map<|assistant|>"
    assert [a.text for a in chat] == [a.text for a in Speaker(run, chat=False).answer(written, samples=4)]


def test_a_run_on_plain_prompts_is_talked_to_plainly(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "summary.json").write_text(json.dumps({"prompt_format": "plain"}))
    assert not Speaker(tmp_path / "r").chat


def test_prompts_come_from_standard_input(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("draw a map\n\n  \nbake \x1b[31mbread\n"))
    assert command(run, "--temperature", 0, "--max-new-tokens", 4) == 0
    said = capsys.readouterr().out
    assert "› draw a map\n" in said and "› bake �[31mbread\n" in said and "\x1b" not in said
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert command(run) == 2
    assert "no prompt" in capsys.readouterr().err


def test_a_run_without_reward_model_prints_the_text_alone(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r", ignore=shutil.ignore_patterns("reward_model"))
    assert command(tmp_path / "r", "draw a map", "--max-new-tokens", 4) == 0
    assert "safety" not in capsys.readouterr().out


def test_an_adapter_is_loaded_with_peft(tmp_path):
    save_policy(tmp_path / "base", "llama")
    policy = Policy.load(tmp_path / "base", lora=LoraSettings(rank=4))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_(std=0.5)
    policy.save(tmp_path / "r" / "model")
    assert (tmp_path / "r" / "model" / "adapter_config.json").is_file()
    (tmp_path / "r" / "config.toml").write_text(to_toml(TrainConfig(rollout=ROLLOUT)))
    adapted = Speaker(tmp_path / "r").answer("draw a map", samples=3)
    shutil.copytree(tmp_path / "base", tmp_path / "plain" / "model")
    shutil.copy(tmp_path / "r" / "config.toml", tmp_path / "plain")
    assert [a.text for a in adapted] != [
        a.text for a in Speaker(tmp_path / "plain").answer("draw a map", samples=3)
    ]


def broken(path: Path, name: str, data: bytes | None) -> None:
    (path / name).unlink() if data is None else (path / name).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("model/model.safetensors", b"\x80\x04junk", "cannot read its weights"),
        ("model/config.json", b"{", "cannot read its configuration"),
        ("model/config.json", None, "no saved model"),
        ("model/tokenizer.json", b"{}", "tokenizer"),
        ("reward_model/reward_heads.json", b"[", "reward_heads.json"),
        ("config.toml", b"steps = ", "not valid TOML"),
        ("summary.json", b"{", "summary.json"),
    ],
)
def test_a_damaged_run_is_one_line(run, tmp_path, capsys, name, data, words):
    shutil.copytree(run, tmp_path / "r")
    broken(tmp_path / "r", name, data)
    assert command(tmp_path / "r", "draw a map") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and str(tmp_path) in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}/absent", "p"], "found nothing"),
        (["{run}/config.toml", "p"], "found a file"),
        (["{run}/model", "p"], "is not the folder of a run"),
        (["{run}", " "], "the prompt is empty"),
        (["{run}", "p", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["{run}", "p", "--temprature", "1"], "did you mean --temperature?"),
        (["{run}", "p", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["{run}", "p", "--temperature", "-1"], "temperature"),
        (["{run}", "p", "--max-new-tokens", "0"], "max_new_tokens"),
        (["{run}", "p " * 300], "model's limit of 256"),
        ([], "the following arguments are required: run"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, words):
    assert command(*[argument.replace("{run}", str(run)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert captured.out == ""


def test_a_run_that_has_not_finished_says_how_to_go_on(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("")
    assert command(tmp_path, "p") == 2
    assert f"go on with python -m grpo_fast.train --resume {tmp_path}" in capsys.readouterr().err
