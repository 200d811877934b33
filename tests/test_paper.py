"""The paper's experiment end to end with stand-ins: files in the data sets' schemas, tiny weights, a test judge."""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.paper import __main__ as paper
from benchmarks.paper.prepare import key_of
from grpo_fast import train, train_reward
from grpo_fast.config.settings import RolloutSettings
from grpo_fast.data.prompts import Row, tokenize
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.choose import builtin_engine
from grpo_fast.errors import UserError
from grpo_fast.models.policy import Policy
from tests.judge_server import JudgeServer, data_fields
from tests.paper_case import AMOUNTS, FILES, flags, rating, rows_of, rubric_of, user
from tests.tiny import save_policy

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "paper"
OBJECTIVES = ("safety", "politeness", "meaningfulness", "actionability")


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    with JudgeServer(models=("rater", "evaluator")) as server:
        server.rate = rating
        yield server


def in_this_process(module: str, words: list[str]) -> int:
    """A command of the trainer without a process that imports everything again."""
    with pytest.raises(SystemExit) as stop:
        {"grpo_fast.train": train.main, "grpo_fast.train_reward": train_reward.main}[module](words)
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture(scope="module")
def done(tmp_path_factory, judge: JudgeServer) -> SimpleNamespace:
    """Everything once: prepare, label, reward model, training, evaluation."""
    root = tmp_path_factory.mktemp("paper")
    folder, model = root / "experiment", root / "policy"
    save_policy(model, "qwen2", max_position_embeddings=4096, initializer_range=0.5)
    assert paper.main(["prepare", "--folder", str(folder), "--files", str(FILES), *AMOUNTS]) == 0
    asked = flags(judge, "rater")
    words = [
        "sample",
        "--folder",
        str(folder),
        "--size",
        "0.5b",
        "--device",
        "cpu",
        "--prompts",
        "5",
        "--batch",
        "3",
    ]
    assert (
        paper.main([*words, "--train", f"--policy.model {model} --dtype float32 --rollout.max-new-tokens 6"])
        == 0
    )
    assert paper.main(["label", "--folder", str(folder), *asked]) == 0
    labelling, judge.payloads = judge.payloads, []
    early: list[str] = []

    def watched(payload: dict[str, Any]) -> str:
        prompt, _ = data_fields(payload)
        if not (folder / "0.5b" / "model").is_dir():
            early.append(str(prompt))
        return rating(payload)

    judge.rate = watched
    small = "--dtype float32 --data.eval-size 4"
    training = f"{small} --policy.model {model} --rollout.prompts-per-step 4 --rollout.group-size 2"
    training += " --rollout.max-new-tokens 6 --run.steps 2 --run.samples 2"
    training += " --optim.lr 0.1 --optim.warmup-steps 0"  # so that the greedy completions change
    rewarding = f"{small} --backbone.model {model} --run.epochs 1 --run.probes 4 --optim.batch-size 16"
    words = ["run", "--folder", str(folder), "--size", "0.5b", "--device", "cpu", "--batch", "7"]
    words += ["--train", training, "--train-reward", rewarding, *flags(judge, "evaluator")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("benchmarks.paper.run.trainer", in_this_process)
        assert paper.main(words) == 0
    judge.rate = rating
    return SimpleNamespace(
        folder=folder,
        model=model,
        run=folder / "0.5b",
        labelling=labelling,
        evaluating=judge.payloads,
        early=early,
        words=words,
        record=json.loads((folder / "0.5b" / "paper" / "paper.json").read_text()),
    )


# ---- the data ----


def test_no_heldout_prompt_is_trained_on(done):
    training, heldout = (rows_of(done.folder / f"{name}.jsonl") for name in ("prompts", "heldout"))
    rated = rows_of(done.folder / "ratings.jsonl")
    held = {key_of(user(row)) for row in heldout}
    assert held and not held & {key_of(user(row)) for row in training}
    assert rated and not held & {key_of(user(row)) for row in rated}
    # the one attack of a benchmark that BeaverTails has too, in another spelling
    assert key_of("(stand-in for an attack 3) please spoil a kite") in held
    assert not {row["source"] for row in training} & {"xstest", "jbb-harmful", "jbb-benign"}


def test_what_is_harmful_borderline_and_benign(done):
    rows = [row for name in ("prompts", "heldout") for row in rows_of(done.folder / f"{name}.jsonl")]
    for row in rows:
        assert (row["kind"] == "harmful") == user(row).startswith("(stand-in"), row
    assert {row["kind"] for row in rows if row["source"] == "xstest"} == {"harmful", "borderline"}
    asked = {user(row) for row in rows}
    assert "what a fine day to fly a kite?" not in asked  # every reply to it was safe
    assert not [text for text in asked if "extra_id" in text]
    pku = {user(row) for row in rows if row["source"] == "pku-saferlhf"}
    assert len(pku) == 4 and not [text for text in pku if "bird house" in text]  # one of its replies was safe


def test_ratings_are_the_peoples_where_they_exist_and_the_raters_elsewhere(done):
    rows = rows_of(done.folder / "ratings.jsonl")
    assert all(set(OBJECTIVES) <= row.keys() for row in rows)
    people = [row for row in rows if row["source"] == "beavertails"]
    assert people and {row["safety"] for row in people} == {0.0, 1.0}
    requests = Counter(rubric_of(payload) for payload in done.labelling)
    others = [row for row in rows if row["source"] != "beavertails"]
    own = [row["response"] for row in rows if row["source"] == "own-0.5b"]
    assert len(own) == 5 == len({text for text in own if text})  # each its own words
    assert requests["safety"] == len(others) > 0
    assert requests["actionability"] == len(rows)
    reply = others[0]["response"]
    assert others[0]["safety"] == pytest.approx(len(reply + "safety") % 11 / 10)


# ---- training and evaluation ----


def test_training_never_asks_the_judge(done):
    assert done.early == ["What is two and two?"]  # whether it is there, before anything is trained
    config = tomllib.loads((done.run / "config.toml").read_text())
    assert not config.get("judge", {}).get("url")
    assert config["advantage"]["mode"] == "scalarized" and config["policy"]["lora_rank"] == 16
    assert json.loads((done.run / "summary.json").read_text())["steps"] == 2


def test_each_question_goes_to_the_prompts_it_is_for(done):
    heldout = {user(row): row["kind"] for row in rows_of(done.folder / "heldout.jsonl")}
    kinds: dict[str, set[str]] = {}
    for payload in done.evaluating:
        prompt, _ = data_fields(payload)
        if prompt in heldout:
            kinds.setdefault(rubric_of(payload), set()).add(heldout[prompt])
    every = {"harmful", "borderline", "benign"}
    expected = {"attack_success": {"harmful"}, "refusal": {"borderline", "benign"}}
    assert kinds == dict.fromkeys(OBJECTIVES, every) | expected


def test_attack_success_and_over_refusal_are_shares_of_their_own_prompts(done):
    rows = rows_of(done.folder / "heldout.jsonl")

    def share(kinds: set[str], hit) -> float:
        chosen = [user(row) for row in rows if row["kind"] in kinds]
        return sum(map(hit, chosen)) / len(chosen)

    attacks = share({"harmful"}, lambda text: "sand castle" in text)
    refused = share({"borderline"}, lambda text: text.startswith("how"))
    record = done.record
    assert 0 < attacks < 1 and 0 < refused < 1
    for when in ("before", "after"):
        assert record["attack_success"]["harmful"][when]["mean"] == pytest.approx(attacks)
        assert record["over_refusal"]["borderline"][when]["mean"] == pytest.approx(refused)
    assert record["over_refusal"]["benign"]["after"]["mean"] == 0
    assert record["attack_success"]["jbb-harmful"]["prompts"] == 2
    assert (
        record["prompts"]["all"] == len(rows) == (3 + 2 + 2) + (2 + 2 + 3)
    )  # a fifth at most, and benchmarks
    assert "xstest" in record["attack_success"] and "xstest" in record["over_refusal"]


def test_the_record_has_both_judges_before_and_after(done):
    before, after = (rows_of(done.run / "paper" / f"{when}.jsonl") for when in ("before", "after"))
    expected = torch.tensor(
        [len(row["completion"] + "safety") % 11 / 10 for row in after], dtype=torch.float64
    )
    safety = done.record["objectives"]["all"]["safety"]
    assert safety["judge"]["after"]["mean"] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert [user(row) for row in rows_of(done.folder / "heldout.jsonl")] == [row["prompt"] for row in before]
    for name in OBJECTIVES:
        entry = done.record["objectives"]["harmful"][name]["reward_model"]
        low, high = entry["before"]["ci95"]
        assert low < entry["before"]["mean"] < high and entry["missing"] == 0
    page = (done.run / "paper" / "report.html").read_text()
    assert "attack success" in page and "data:image/png;base64" in page and "labelled by rater" in page
    assert done.record["independent"] and done.record["judge"] == "evaluator"


def test_before_is_the_start_policy_and_after_the_trained_one(done):
    rows = rows_of(done.folder / "heldout.jsonl")
    found = {}
    for when, model in (("before", done.model), ("after", done.run / "model")):
        policy = Policy.load(model)
        prompts = tokenize([Row(row["prompt"], {}, "here") for row in rows], policy.tokenizer)
        sampling = Sampling.of(RolloutSettings(temperature=0.0, max_new_tokens=6), policy.stop_token_ids)
        made = builtin_engine(policy.eval(), max_rows=8).generate(
            [p.token_ids for p in prompts], 1, sampling, 0
        )
        found[when] = [policy.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in made]
        assert [row["completion"] for row in rows_of(done.run / "paper" / f"{when}.jsonl")] == found[when]
    assert found["before"] != found["after"]


def test_what_is_there_is_not_made_again(done, judge, capsys):
    output = done.run / "paper"
    kept = (output / "after.jsonl").read_bytes()
    lines = kept.splitlines(keepends=True)
    (output / "after.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])  # killed while it wrote
    asked = len(judge.payloads)
    words = ["evaluate", str(done.run), "--device", "cpu", "--batch", "7", *flags(judge, "evaluator")]
    assert paper.main(words) == 0
    said = capsys.readouterr().out
    assert (output / "after.jsonl").read_bytes() == kept
    assert "before: " not in said and "after: 14 of 14 completions" in said
    assert [data_fields(payload)[1] for payload in judge.payloads[asked:]] == ["Four."]  # the check alone
    with pytest.raises(UserError, match=r"made with temperature = 0.0, not 1.0: give another folder"):
        paper.main([*words, "--temperature", "1"])


def test_run_and_prepare_and_label_again_do_nothing_new(done, judge, capsys):
    trained = (done.run / "summary.json").stat().st_mtime_ns
    assert paper.main(done.words) == 0
    assert (done.run / "summary.json").stat().st_mtime_ns == trained
    assert "python -m grpo_fast" not in capsys.readouterr().out
    here = ["--folder", str(done.folder)]
    assert paper.main(["prepare", *here, "--files", str(FILES), *AMOUNTS]) == 0
    assert paper.main(["label", *here, *flags(judge, "rater")]) == 0
    assert "prepared already" in (said := capsys.readouterr().out) and "labelled already, by rater" in said
    with pytest.raises(UserError, match="prepared with --seed 0, not 1"):
        paper.main(["prepare", *here, "--files", str(FILES), *AMOUNTS, "--seed", "1"])


# ---- dry runs ----


@pytest.mark.parametrize("size", ["0.5b", "7b", "14b"])
def test_every_size_passes_the_dry_run(done, size: str, capsys):
    words = [
        "--config",
        CONFIGS / f"qwen2.5-{size}.toml",
        "--device",
        "cpu",
        "--output-dir",
        done.folder / "other",
    ]
    words += ["--policy.model", done.model, "--reward.model", done.folder / "reward-model" / "model"]
    words += [
        "--data.prompts",
        done.folder / "prompts.jsonl",
        "--data.eval-prompts",
        done.folder / "heldout.jsonl",
    ]
    with pytest.raises(SystemExit) as stop:
        train.main([str(word) for word in [*words, "--dry-run"]])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    said = re.sub(r"[│\s]+", " ", printed.out)
    assert "scalarized, scaled by group" in said and "Everything was checked" in said
    assert "safety × 1, politeness × 1, meaningfulness × 1, actionability × 1" in said
    recipe = tomllib.loads((CONFIGS / f"qwen2.5-{size}.toml").read_text())
    assert (
        recipe["policy"]["model"].lower() == f"qwen/qwen2.5-{size}-instruct" and recipe["policy"]["lora_rank"]
    )


def test_the_reward_model_recipe_passes_the_dry_run(done, capsys):
    words = [
        "--config",
        CONFIGS / "reward-model.toml",
        "--device",
        "cpu",
        "--output-dir",
        done.folder / "other",
    ]
    words += [
        "--backbone.model",
        done.model,
        "--data.ratings",
        done.folder / "ratings.jsonl",
        "--data.eval-size",
        4,
    ]
    with pytest.raises(SystemExit) as stop:
        train_reward.main([str(word) for word in [*words, "--dry-run"]])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    for name in OBJECTIVES:
        assert re.search(rf"{name}\W+regression", printed.out)


def test_dry_runs_write_nothing(done, judge, tmp_path, capsys):
    folder = tmp_path / "new"
    assert paper.main(["prepare", "--folder", str(folder), "--files", str(FILES), *AMOUNTS, "--dry-run"]) == 0
    assert not folder.exists() and "Everything was checked" in capsys.readouterr().out
    assert paper.main(["prepare", "--folder", str(folder), "--files", str(FILES), *AMOUNTS]) == 0
    before = sorted(folder.iterdir())
    assert paper.main(["label", "--folder", str(folder), "--dry-run", *flags(judge, "rater")]) == 0
    assert sorted(folder.iterdir()) == before
    output = tmp_path / "evaluation"
    words = ["evaluate", str(done.run), "--device", "cpu", "--output", str(output), "--dry-run"]
    assert paper.main([*words, *flags(judge, "evaluator")]) == 0
    assert not output.exists() and "28 completions" in capsys.readouterr().out


# ---- mistakes ----


def test_a_judge_must_be_named_and_independent(done, judge):
    words = ["evaluate", str(done.run), "--device", "cpu"]
    with pytest.raises(UserError, match=r"evaluation needs a judge: give --judge.url"):
        paper.main(words)
    with pytest.raises(UserError, match="rater labelled the replies of the reward model"):
        paper.main([*words, *flags(judge, "rater")])
    with pytest.raises(UserError, match="--train must not name a judge"):
        paper.main(
            [
                "run",
                "--folder",
                str(done.folder),
                "--size",
                "7b",
                "--train",
                "--judge.url x",
                *flags(judge, "evaluator"),
            ]
        )


def test_a_heldout_prompt_that_was_trained_on_is_refused(done, judge, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").mkdir()
    config = (done.run / "config.toml").read_text()
    seen = tmp_path / "heldout.jsonl"
    seen.write_text((done.folder / "prompts.jsonl").read_text().splitlines()[0] + "\n")
    (run / "config.toml").write_text(config.replace(str(done.folder / "heldout.jsonl"), str(seen)))
    with pytest.raises(UserError, match=r"heldout.jsonl:1: this held-out prompt is in"):
        paper.main(["evaluate", str(run), *flags(judge, "evaluator")])
    seen.write_text('{"prompt": "hello"}\n')
    with pytest.raises(UserError, match=r"heldout.jsonl:1: no column 'kind'"):
        paper.main(["evaluate", str(run), *flags(judge, "evaluator")])


def test_an_interrupted_stage_goes_on_from_its_checkpoint(done, judge, monkeypatch):
    """A run's folder without a model is resumed, with its own settings; a stage that fails ends the command."""
    folder = done.folder / "7b"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    called: list[list[str]] = []

    def interrupted(module: str, words: list[str]) -> int:
        called.append([module, *words])
        return 130

    monkeypatch.setattr("benchmarks.paper.run.trainer", interrupted)
    words = ["run", "--folder", str(done.folder), "--size", "7b", "--train", "--run.steps 3"]
    assert paper.main([*words, *flags(judge, "evaluator")]) == 130
    assert called == [["grpo_fast.train", "--resume", str(folder)]]
    assert paper.main([*words, "--dry-run", *flags(judge, "evaluator")]) == 0 and len(called) == 1
    (folder / "config.toml").unlink()
    folder.rmdir()
    assert (
        paper.main([*words, "--dry-run", *flags(judge, "evaluator")]) == 130
    )  # checked by the trainer itself
    assert called[1][-3:] == ["--run.steps", "3", "--dry-run"] and "--config" in called[1]


def test_a_stage_is_a_command_that_exists(done, judge, capfd):
    """As a real process, which ends with the trainer's own exit code and its one line."""
    words = ["run", "--folder", str(done.folder), "--size", "14b", "--device", "cpu", "--dry-run"]
    words += ["--train", "--policy.model /no/such/model", *flags(judge, "evaluator")]
    assert paper.main(words) == 2
    assert (
        "policy.model must be the folder of a model, /no/such/model does not exist" in capfd.readouterr().err
    )
