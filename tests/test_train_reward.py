"""The command that trains a reward model, end to end: what it leaves, going on after an interruption, and refusals."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, causal_model, config_of, reward_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from grpo_fast.models.reward_data import Head
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import read_rows, reproducible
from grpo_fast.train_reward import main

FLAGS = ["--optim.batch-size", "8", "--run.epochs", "2", "--data.eval-size", "8", "--run.probes", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones, rated replies of three kinds and preferences, and some that are too long."""
    folder = tmp_path_factory.mktemp("place")
    for name, model in (
        ("lm", causal_model("llama")),
        (
            "t5",
            T5ForConditionalGeneration(
                T5Config(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=2)
            ),
        ),
        (
            "bert",
            BertForSequenceClassification(BertConfig(vocab_size=300, hidden_size=24, num_hidden_layers=1)),
        ),
    ):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    reward_model([Head(name="old")]).save(folder / "earlier")
    draw = random.Random(0)
    rated, pairs = [], []
    for k in range(48):
        text = "".join(draw.choices("abz", k=draw.randint(2, 20)))
        row = {
            "prompt": f"ask {k}",
            "response": text,
            "share": text.count("a") / len(text),
            "has_z": int("z" in text),
        }
        rated.append(row | {"level": min(text.count("b"), 3)} | ({"share": None} if k % 3 == 0 else {}))
        pairs.append({"prompt": f"choose {k}", "chosen": text + "a", "rejected": text + "b"})
    write(folder / "rated.jsonl", rated)
    write(folder / "pairs.jsonl", pairs)
    write(folder / "long.jsonl", [*rated, rated[0] | {"response": "y" * 300}])
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(*flags: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    return stop.value.code if isinstance(stop.value.code, int) else 0


def given(place: Path, *sources: str, backbone: str = "lm") -> list[object]:
    ratings = [place / f"{name}.jsonl" for name in sources]
    return ["--backbone.model", place / backbone, "--data.ratings", *ratings, *FLAGS]


def metrics(run: Path) -> list[dict]:
    return [reproducible(row) for row in read_rows(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(place: Path) -> Path:
    """A whole run on ratings and preferences with every kind of head, an ensemble of two."""
    flags = ["--data.kinds.level", "ordinal", "--backbone.members", "2", "--loss.uncertainty-weighting"]
    assert command(*given(place, "rated", "pairs"), *flags, "--output-dir", place, "--name", "straight") == 0
    return place / "straight"


def test_a_run_leaves_a_model_its_quality_and_a_summary(straight: Path):
    heads = RewardModel.load(straight / "model").heads
    assert {h.name: h.kind for h in heads} == {
        "share": "regression",
        "has_z": "binary",
        "level": "ordinal",
        "preference": "pairwise",
    }
    theirs = AutoModelForSequenceClassification.from_pretrained(straight / "model")
    assert theirs.config.num_labels == 8
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 22  # 88 prompts in batches of 8, twice
    assert summary["data"]["counts"]["training prompts"] == 88
    assert summary["data"]["counts"]["held-out prompts"] == 8
    assert summary["tokens_per_s"] > 0 and set(summary["heads"]) == {h.name for h in heads}
    assert "outside" in json.loads((straight / "quality.json").read_text())
    rows = metrics(straight)
    assert [row["step"] for row in rows] == list(range(1, 23)) and {row["phase"] for row in rows} == {
        "reward_model"
    }
    assert all(f"loss/{h.name}" in row for row in rows for h in heads)
    assert rows[0]["lr"] == pytest.approx(1e-5) and rows[-1]["lr"] < 1e-6
    samples = read_rows(straight / "samples.jsonl")
    assert len(samples) == 8 and set(samples[0]["scores"]) == {h.name for h in heads}
    trained = RewardModel.load(straight / "model")
    shown = trained.scores([samples[0]["prompt"]], [samples[0]["completion"]])[0].tolist()
    assert list(samples[0]["scores"].values()) == pytest.approx(shown, abs=1e-5)


@pytest.mark.parametrize("stop_at", [5, 22])
def test_an_interrupted_run_goes_on_to_the_same_weights_and_metrics(
    straight: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
):
    flags = ["--data.kinds.level", "ordinal", "--backbone.members", "2", "--loss.uncertainty-weighting"]
    log = Run.step

    def interrupted(self, number, scalars):
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, number, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupted)
        assert (
            command(*given(place, "rated", "pairs"), *flags, "--output-dir", tmp_path, "--name", "cut") == 130
        )
    run = tmp_path / "cut"
    assert len(metrics(run)) == stop_at and not (run / "model").exists()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert command("--resume", run) == 0
    assert metrics(run) == metrics(straight)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (run, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("samples.jsonl", "quality.json", "model/reward_heads.json"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name


def test_a_finished_run_goes_on_with_more_epochs(place: Path, tmp_path: Path):
    run = tmp_path / "r"
    assert command(*given(place, "rated"), "--output-dir", tmp_path, "--name", "r", "--run.epochs", "1") == 0
    first = len(metrics(run))
    assert command("--resume", run, "--run.epochs", "2") == 0
    assert len(metrics(run)) == 2 * first


def test_a_head_of_noise_is_told_from_one_that_learned(tmp_path: Path, capsys: pytest.CaptureFixture):
    """End to end: what the file says, what the command says of it."""
    draw = random.Random(0)
    rows = []
    for _ in range(600):
        text = "".join(draw.choices("ab", k=draw.randint(4, 10)))
        label = text.count("a") / len(text) + draw.gauss(0, 0.02)
        rows.append(
            {"prompt": f"go {len(rows)}:", "response": text, "share": label, "noise": draw.gauss(0, 1)}
        )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    causal_model("qwen2").save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    flags = [
        "--backbone.model",
        tmp_path / "lm",
        "--data.ratings",
        tmp_path / "r.jsonl",
        "--optim.lr",
        "3e-3",
    ]
    flags += [
        "--run.epochs",
        "6",
        "--data.eval-size",
        "100",
        "--output-dir",
        tmp_path,
        "--name",
        "r",
        "--run.probes",
        "0",
    ]
    assert command(*flags) == 0
    verdicts = {h.name: h.verdict for h in RewardModel.load(tmp_path / "r" / "model").heads}
    assert verdicts["noise"] == "untrustworthy" and verdicts["share"] != "untrustworthy"
    printed = capsys.readouterr().out
    assert "noise: untrustworthy" in printed


def test_a_finished_run_says_how_to_go_on(straight: Path, capsys: pytest.CaptureFixture):
    assert command("--resume", straight) == 2
    assert "give more with --run.epochs" in capsys.readouterr().err
    assert command("--resume", straight, "--run.epochs", "1") == 2
    assert "has gone further than asked for, 22 steps of 11" in capsys.readouterr().err
    assert command("--resume", straight, "--optim.lr", "1") == 2
    assert "--optim.lr cannot be given with --resume" in capsys.readouterr().err


def test_another_seed_gives_another_model(straight: Path, place: Path, tmp_path: Path):
    flags = [
        "--data.kinds.level",
        "ordinal",
        "--backbone.members",
        "2",
        "--loss.uncertainty-weighting",
        "--seed",
        "1",
    ]
    assert command(*given(place, "rated", "pairs"), *flags, "--output-dir", tmp_path, "--name", "other") == 0
    assert metrics(tmp_path / "other") != metrics(straight)


def test_held_out_ratings_of_their_own(place: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (place / "rated.jsonl").read_text().splitlines()]
    del rows[0]["level"]
    write(
        tmp_path / "held.jsonl",
        [{**row, "prompt": "again " + row["prompt"], "level": None} for row in rows[:20]],
    )
    flags = ["--data.eval-ratings", tmp_path / "held.jsonl", "--output-dir", tmp_path, "--name", "r"]
    assert command(*given(place, "rated"), *flags) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["data"]["counts"]["training prompts"] == 48
    assert summary["data"]["counts"]["held-out prompts"] == 20
    assert read_rows(tmp_path / "r" / "samples.jsonl")[0]["prompt"] == "again ask 0"


def test_an_adapter_is_trained_and_merged(place: Path, tmp_path: Path):
    flags = [
        "--backbone.lora-rank",
        "4",
        "--loss.regression",
        "gaussian",
        "--output-dir",
        tmp_path,
        "--name",
        "lora",
    ]
    assert command(*given(place, "rated"), *flags) == 0
    model = RewardModel.load(tmp_path / "lora" / "model")
    assert model.layout.gaussian and [head.name for head in model.heads] == ["share", "has_z", "level"]
    assert metrics(tmp_path / "lora")[1]["lr"] > 5e-5  # with an adapter the default is 1e-4
    base = causal_model("llama").get_parameter("model.layers.0.self_attn.q_proj.weight")
    merged = model.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert 0 < (merged - base).abs().max() < 0.01
    assert torch.equal(
        model.model.get_parameter("model.norm.weight"),
        causal_model("llama").get_parameter("model.norm.weight"),
    )


def test_an_earlier_reward_model_is_a_backbone(place: Path, tmp_path: Path):
    flags = ["--output-dir", tmp_path, "--name", "next"]
    assert command(*given(place, "pairs", backbone="earlier"), *flags) == 0
    assert RewardModel.load(tmp_path / "next" / "model").head_names == ["preference"]


@pytest.mark.slow
def test_without_arguments_the_miniature_s_is_trained(tmp_path: Path):
    small = [
        "--miniature.hidden",
        "32",
        "--miniature.layers",
        "1",
        "--miniature.heads",
        "2",
        "--miniature.labelled",
    ]
    small += ["128", "--run.probes", "8"]
    assert command(*small, "--data.eval-size", "20", "--output-dir", tmp_path, "--name", "m") == 0
    model = RewardModel.load(tmp_path / "m" / "model")
    assert model.head_names == ["safety", "politeness", "meaningfulness", "actionability"]
    assert {row["phase"] for row in metrics(tmp_path / "m")} == {"reward_model"}


def test_dry_run_shows_the_plan_and_writes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = [
        "--data.kinds.level",
        "ordinal",
        "--backbone.members",
        "3",
        "--output-dir",
        tmp_path,
        "--dry-run",
    ]
    assert command(*given(place, "rated", "pairs"), *flags) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Everything was checked" in words and not any(tmp_path.iterdir())
    model = RewardModel.from_config(config_of("llama"), byte_tokenizer(), model_layout())
    count = sum(p.numel() for p in model.model.parameters())
    assert f"llama, {count:,} parameters, {count:,} trained" in words
    assert "12 (3 of each head)" in words and "22 of 8 prompts, 2 epochs" in words
    assert "preference pairwise comparisons 44 4" in words and "level ordinal 0 to 3 44 4" in words
    assert (
        "0 of replies longer than 256 tokens" in words
    )  # the model's own limit, smaller than data.max_tokens
    assert command("--output-dir", tmp_path, "--dry-run", "--miniature.labelled", "32") == 0
    assert "the miniature's, a new one" in capsys.readouterr().out and not any(tmp_path.iterdir())


def model_layout():
    from grpo_fast.models.reward_data import Layout

    return Layout(heads=tuple(Head(name=name) for name in "abcd"), members=3)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            "--loss.weights.shere 2",
            "loss.weights names 'shere', but the heads are share, has_z, level; did you mean share?",
        ),
        ("--data.ratings {place}/absent.jsonl", "{place}/absent.jsonl"),
        (
            "--data.ratings {place}/long.jsonl",
            "long.jsonl:49: the reply has 301 tokens, with its prompt it may have 256",
        ),
        ("--data.max-tokens 15", "with its prompt it may have 15 (data.max_tokens or"),
        ("--data.rename.shar=x", "did you mean share?"),
        (
            "--data.kinds.level pairwise",
            "data.kinds.level must be one of regression, binary, ordinal, got 'pairwise'",
        ),
        (
            "--data.eval-ratings {place}/pairs.jsonl",
            "data.eval_ratings has a head preference, which data.ratings has not",
        ),
        ("--data.eval-ratings {place}/long.jsonl", "long.jsonl:49: the reply has 301 tokens"),
        ("--backbone.model {place}/t5", "T5ForSequenceClassification is an encoder-decoder; a decoder-only"),
        ("--backbone.model {place}/bert", "BertForSequenceClassification"),
        ("--backbone.model {place}/nowhere", "no such folder"),
        ("--loss.huber-delta 2", "loss.huber_delta needs loss.regression = huber, it is mse"),
        (
            "--loss.uncertainty-weighting --loss.weights.share 2",
            "cannot be given with loss.uncertainty_weighting",
        ),
        ("--loss.weights.share -1", "loss.weights.share must be >= 0"),
        ("--backbone.members 0", "backbone.members must be"),
        ("--learning-rate 1", "unknown flag --learning-rate; did you mean --optim.lr?"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changed: str, words: str, dry: list[str]
):
    flags = [flag.replace("{place}", str(place)) for flag in changed.split()]
    start = [str(flag) for flag in given(place, "rated")]
    if flags[0] in start:  # given instead
        k = start.index(flags[0])
        start[k : k + 2] = []
    assert command(*start, *flags, "--output-dir", tmp_path / "runs", "--name", "r", *dry) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words.replace("{place}", str(place)) in captured.err
    assert not (tmp_path / "runs" / "r").exists()  # the name is free for the next attempt


def test_a_backbone_needs_ratings_and_ratings_a_backbone(place: Path, capsys: pytest.CaptureFixture):
    assert command("--backbone.model", place / "lm") == 2
    assert "data.ratings must be given with backbone.model" in capsys.readouterr().err
    assert command("--data.ratings", place / "rated.jsonl") == 2
    assert "backbone.model must be given with data.ratings" in capsys.readouterr().err
