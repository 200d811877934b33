"""Steps' rollouts: groups replaced, prompts at rest, one step ahead; the overlong objective; the mismatch limit."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_fast.config.resolve import mismatch_limit
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Prompt
from grpo_fast.data.queue import PromptQueue
from grpo_fast.engines import run as generation
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.separate import SeparateEngine
from grpo_fast.errors import UserError
from grpo_fast.grpo import check_mismatch, token_weighted
from grpo_fast.pipeline import Pipeline
from grpo_fast.rewards.overlong import Overlong
from grpo_fast.rollout import refilled
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import read_rows
from grpo_fast.scoring import Scored, Scorer, Scoring
from tests.families import ragged, tiny_model
from tests.test_grpo import GROUP, rollout
from tests.test_train import metrics, run_command
from tests.tiny import save_policy, write_prompts

REWARDS = '''
def parity(prompts, completions, **columns):
    """Half of the prompts can teach nothing: all their completions score alike."""
    return [
        0.0 if int(prompt.split()[-1]) % 2 else sum(letter == "e" for letter in text) / 16
        for prompt, text in zip(prompts, completions)
    ]
'''
FLAGS = ["--rollout.prompts-per-step", "4", "--rollout.group-size", "4", "--rollout.max-new-tokens", "8",
         "--data.eval-size", "4", "--run.steps", "5", "--loss.preset", "dapo", "--optim.lr", "1e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_policy(folder / "policy", "qwen2")
    write_prompts(folder / "prompts.jsonl", 24)
    (folder / "parity_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """A run on the tiny policy; returns its folder."""
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))

    def started(name: str, *flags: str) -> Path:
        given = ["--policy.model", "policy", "--data.prompts", "prompts.jsonl"]
        given += [
            "--reward.functions",
            "parity_rewards:parity",
            "--output-dir",
            str(tmp_path),
            "--name",
            name,
        ]
        assert run_command(*given, *FLAGS, *flags) == 0
        return tmp_path / name

    return started


def test_groups_without_signal_are_replaced(run):
    plain, full = metrics(run("plain")), metrics(run("full", "--rollout.refill", "6"))
    assert sum(row["flat_groups_frac"] for row in plain) > 1
    assert all(row["flat_groups_frac"] == 0 for row in full)
    assert sum(row["refilled_groups"] for row in full) >= 4
    assert all("refilled_groups" not in row for row in plain)
    once = metrics(run("once", "--rollout.refill", "1"))
    assert any(row["flat_groups_frac"] > 0 for row in once), "one round must not always be enough here"


def test_prompts_at_rest_are_asked_less_often(run):
    rows = metrics(run("rest", "--rollout.rest", "4", "--run.steps", "14"))
    flat = [row["flat_groups_frac"] for row in rows]
    assert sum(flat[6:]) / len(flat[6:]) < 0.8 * sum(flat[:6]) / 6


def test_refilling_keeps_signal_first_and_compares_anew():
    config = TrainConfig(rollout=replace(TrainConfig().rollout, group_size=GROUP))
    scorer = Scorer(
        names=["a"], weights=torch.ones(1), settings=config.reward, models=None, judge=None, functions=None,
        overlong=None, token_budget=1,
    )  # fmt: skip

    def scored(data, flat):
        rewards = torch.rand(len(data.completions), 1, generator=torch.Generator().manual_seed(1))
        for group in flat:
            rewards[group * GROUP : (group + 1) * GROUP] = 0.5
        advantages = rewards[:, 0] - rewards.view(-1, GROUP).mean(1).repeat_interleave(GROUP)
        spread = torch.full_like(rewards, torch.nan)
        return replace(data, scored=Scored(rewards=rewards, spread=spread), advantages=advantages)

    first, more = scored(rollout(3), {0, 2}), scored(rollout(2, seed=5), {0})
    assert first.flat == [True, False, True] and more.flat == [True, False]
    found = refilled(first, more, scorer, config, torch.ones(1))
    assert [
        p is q
        for p, q in zip(found.prompts, [first.prompts[1], more.prompts[1], first.prompts[0]], strict=True)
    ]
    assert found.prompts == [first.prompts[1], more.prompts[1], first.prompts[0]]
    assert found.completions[GROUP : 2 * GROUP] == more.completions[GROUP:]
    assert torch.equal(found.rewards[:GROUP], first.rewards[GROUP : 2 * GROUP])
    assert found.flat == [False, False, True] and found.prompt_of == [
        g for g in range(3) for _ in range(GROUP)
    ]


AHEAD = ["--rollout.ahead", "--loss.mismatch", "truncate", "--run.save-every", "2", "--run.eval-every", "0"]


def test_one_step_ahead_uses_older_weights_and_repeats_itself(run):
    seen = []
    push = SeparateEngine.push

    def counting(self, named_parameters, version):
        seen.append((version, threading.current_thread().name))
        push(self, named_parameters, version)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeparateEngine, "push", counting)
        ahead = run("ahead", *AHEAD)
    again, straight = run("again", *AHEAD), run("straight", *AHEAD[1:])
    assert metrics(ahead) == metrics(again)
    rows, on_policy = metrics(ahead), metrics(straight)
    assert "time/ahead_s" not in read_rows(straight / "metrics.jsonl")[1] and all(
        "time/ahead_s" in read for read in read_rows(ahead / "metrics.jsonl")[1::2]
    )
    # Drained at saves: steps 1, 3 and 5 are on policy, 2 and 4 were generated before the step in front of them.
    gaps = [row["mismatch_mean"] for row in rows]
    assert max(gaps[0::2]) < 1e-4 < 10 * min(gaps[1::2]) and min(gaps[1::2]) > 1e-3
    assert max(row["mismatch_mean"] for row in on_policy) < 1e-4
    assert all(0 < row["mismatch_ess"] < 1 for row in rows[1::2])
    assert rows[1]["generated_tokens"] and [v for v, _ in seen] == [0, 2, 4, 5]
    assert all(name == "MainThread" for _, name in seen)


def test_a_run_ahead_resumes_at_its_checkpoints_to_the_same_metrics(run, tmp_path, monkeypatch):
    whole = run("whole", *AHEAD)
    log = Run.step

    def interrupted(self, number, scalars):
        if (self._phase, number) == ("grpo", 2):
            os.kill(os.getpid(), signal.SIGINT)
        log(self, number, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupted)
        with pytest.raises(AssertionError):
            run("cut", *AHEAD)
    assert run_command("--resume", tmp_path / "cut") == 0
    assert metrics(tmp_path / "cut") == metrics(whole)


def test_resting_prompts_survive_an_interruption(run, tmp_path, monkeypatch):
    flags = ["--rollout.rest", "3", "--rollout.refill", "2", "--run.steps", "8", "--run.save-every", "0"]
    whole = run("whole", *flags)
    log = Run.step

    def interrupted(self, number, scalars):
        if (self._phase, number) == ("grpo", 5):
            os.kill(os.getpid(), signal.SIGINT)
        log(self, number, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupted)
        with pytest.raises(AssertionError):
            run("cut", *flags)
    assert run_command("--resume", tmp_path / "cut") == 0
    assert metrics(tmp_path / "cut") == metrics(whole)


def test_a_separate_engine_has_weights_of_its_own():
    prompts = ragged(groups=3)[0]
    model = tiny_model("qwen2")
    engine = SeparateEngine(model)

    def texts(found):
        return [completion.token_ids for completion in found.generate(prompts, 1, greedy, seed=0)]

    greedy = Sampling(temperature=0, max_new_tokens=12)
    before = texts(engine)
    with torch.no_grad():
        model.base_model.layers[1].mlp.up_proj.weight.mul_(-1)
    assert texts(engine) == before
    engine.push(model.named_parameters(), 3)
    assert texts(engine) != before and texts(engine) == texts(LocalEngine(model))
    assert engine.generate(prompts, 1, greedy, seed=0)[0].version == 3


def test_overlong_falls_over_the_buffer():
    reward = Overlong(limit=16, buffer=4)
    assert reward([1, 12, 13, 14, 15, 16]).flatten().tolist() == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0]


def test_overlong_is_an_objective_of_a_run(run):
    letters = list("abcdefghijklmnopqrstuvwxyz")
    folder = run(
        "overlong", "--reward.overlong-buffer", "6", "--run.steps", "2", "--rollout.stop-tokens", *letters
    )
    rows = metrics(folder)
    assert all(-1 <= row["reward/overlong"] <= 0 for row in rows)
    assert "overlong" in json.loads((folder / "summary.json").read_text())["objectives"]
    assert any(row["reward/overlong"] > -1 for row in rows)


def test_overlong_needs_lengths():
    scorer = Scorer.create(TrainConfig().reward, None, None, overlong=Overlong(limit=4, buffer=2))
    assert scorer.names == ["overlong"]
    prompt = Prompt("p", [1], None, {})
    assert scorer([prompt, prompt], ["a", "b"], [2, 4]).rewards.tolist() == [[0.0], [-1.0]]
    with pytest.raises(ValueError, match="lengths"):
        scorer([prompt], ["a"])


def test_running_out_of_memory_outside_a_micro_batch_keeps_the_steps(run, capsys, monkeypatch):
    scored = []
    result = Scoring.result

    def failing(self):
        scored.append(1)
        if len(scored) == 4:  # the evaluation before, two steps
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result(self)

    monkeypatch.setattr(Scoring, "result", failing)
    with pytest.raises(AssertionError):
        run("full", "--run.eval-every", "0")
    said = capsys.readouterr().err
    assert "error: out of memory outside a micro-batch" in said and "2 steps are kept" in said


def test_a_step_that_ends_half_way_is_not_saved(run, capsys, monkeypatch, tmp_path):
    flags = [
        "--optim.minibatches",
        "2",
        "--loss.kl-coef",
        "0.01",
        "--run.save-every",
        "2",
        "--run.eval-every",
        "0",
    ]
    whole = run("whole", *flags)
    calls = []

    def failing(*_, **__):
        calls.append(1)
        if len(calls) == 8:  # the second minibatch of step 4
            raise UserError("too far")

    with monkeypatch.context() as patch:
        patch.setattr("grpo_fast.grpo.check_mismatch", failing)
        with pytest.raises(AssertionError):
            run("cut", *flags)
    assert "too far; 2 steps are kept" in capsys.readouterr().err
    assert run_command("--resume", tmp_path / "cut") == 0
    assert metrics(tmp_path / "cut") == metrics(whole)


def test_the_limit_leaves_truncated_sampling_alone():
    plain = TrainConfig()
    assert mismatch_limit(plain) == 0.1
    loss = replace(plain.loss, mismatch="truncate")
    cut = replace(plain, loss=loss, rollout=replace(plain.rollout, top_p=0.9))
    assert mismatch_limit(cut) == 0
    assert mismatch_limit(replace(cut, engine=replace(cut.engine, max_mismatch=0.3))) == 0.3


def batch(tokens: int, k3: float, mean: float = 0.5, **more: float) -> dict[str, torch.Tensor]:
    values = {"tokens": tokens, "mismatch_k3": k3, "mismatch_mean": mean, **more}
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def test_a_large_mismatch_stops_the_run():
    check_mismatch([batch(90, 0.0), batch(10, 0.9)], 0.1)
    check_mismatch([batch(1, 50.0)], 0.0)
    check_mismatch([batch(1, float("nan"))], 0.1)  # a non-finite step is skipped, not given up
    with pytest.raises(UserError, match=r"KL divergence 0.5, .* 0.1 .*max_mismatch.*, 0.25 a token"):
        check_mismatch([batch(50, 0.0, 0.0), batch(50, 1.0, 0.5)], 0.1)


def test_the_run_ends_in_one_line_with_its_steps_kept(run, capsys, monkeypatch):
    completion = generation.Run.completion

    def wrong(self, prompt, sample, version):
        found = completion(self, prompt, sample, version)
        return replace(found, logprobs=found.logprobs - 2.0) if version == 3 else found

    monkeypatch.setattr(generation.Run, "completion", wrong)
    with pytest.raises(AssertionError):
        run("off", "--run.eval-every", "0")
    said = capsys.readouterr().err
    assert "KL divergence" in said and "3 steps are kept" in said and "Traceback" not in said


def test_the_effective_sample_size():
    gap = torch.tensor([0.0, 0.5, -0.25, 1.0], dtype=torch.float64)
    found = batch(4, (torch.expm1(gap) - gap).mean().item(), mismatch_k1=-gap.mean().item(),
                  mismatch_square=torch.exp(2 * gap).mean().item())  # fmt: skip
    weights = gap.exp()
    expected = weights.sum() ** 2 / weights.square().sum() / 4
    assert token_weighted([torch.zeros(())], [found])["mismatch_ess"] == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.parametrize(
    "plain", [{"x": 1}, {"prompts": [99]}, {"prompts": "no"}, {"prompts": [0], "metrics": 3}]
)
def test_a_batch_ahead_that_is_none_is_one_line(plain):
    pipeline = object.__new__(Pipeline)
    pipeline._task, pipeline._queue = SimpleNamespace(prompts=["p"]), PromptQueue(1, 0)  # type: ignore[assignment]
    with pytest.raises(UserError, match="generated ahead cannot be taken up"):
        pipeline.take_up({}, plain)
