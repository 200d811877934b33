"""The command on several processes: one run, whatever their number, and one end with one message when one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast.errors import UserError
from grpo_fast.models.policy import Policy
from grpo_fast.run import checkpoint
from grpo_fast.run.metrics import RunLogger, read_rows
from grpo_fast.train import main
from tests.ranks import train_on_ranks
from tests.tiny import save_policy, write_prompts

REWARDS = """
def counts_e(prompts, completions, **columns):
    return [sum(letter == "e" for letter in text) / 16 for text in completions]
"""
CURVE = ["loss", "reward/counts_e", "grad_norm", "entropy", "kl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture
def flags(folder, monkeypatch) -> list[str]:
    """A policy, prompts and a reward of the user's own; one thread, two steps a checkpoint."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    (folder / "job_rewards.py").write_text(REWARDS)
    policy, prompts = save_policy(folder / "llama", "llama"), write_prompts(folder / "prompts.jsonl")
    words = f"--policy.model {policy} --data.prompts {prompts} --data.eval-size 4 --threads 1"
    words += " --reward.functions job_rewards:counts_e --rollout.prompts-per-step 4"
    words += " --rollout.group-size 4 --rollout.max-new-tokens 8 --optim.lr 1e-3 --run.save-every 2"
    return words.split()


def rows(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "metrics.jsonl")


def test_a_run_of_four_goes_on_with_two_and_one_on_the_curve_of_one(flags, tmp_path):
    where = ["--output-dir", tmp_path, "--name"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*flags, "--run.steps", "6", *where, "alone"]])
    assert ended.value.code == 0
    codes, said = train_on_ranks(
        4, [*flags, "--run.steps", "2", *where, "shared"], tmp_path / "four.txt", limit_s=120
    )
    assert codes == [0] * 4, said
    assert said.count("report: ") == 1  # one of them speaks
    shared = tmp_path / "shared"
    resumed = ["--resume", shared, "--run.steps"]
    codes, said = train_on_ranks(2, [*resumed, "4"], tmp_path / "two.txt", limit_s=120)
    assert codes == [0, 0], said
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*resumed, "6"]])
    assert ended.value.code == 0
    ours, expected = rows(shared), rows(tmp_path / "alone")
    assert [row["step"] for row in ours] == [row["step"] for row in expected] == list(range(1, 7))
    for mine, theirs in zip(ours, expected, strict=True):
        for name in set(CURVE) & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (mine["step"], name)
    assert {"loss", "reward/counts_e", "grad_norm"} <= expected[0].keys()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (shared, tmp_path / "alone")]
    assert summaries[0]["status"] == summaries[1]["status"] == "finished"


def no_memory_in_the_update(rank: int) -> None:
    forward = Policy.forward

    def fails(self: Policy, *arguments: Any, **options: Any) -> Any:
        if rank == 1:
            raise torch.OutOfMemoryError("the update takes more than there is")
        return forward(self, *arguments, **options)

    Policy.forward = fails


def no_memory_in_the_rollout(rank: int) -> None:
    from grpo_fast import pipeline

    collect = pipeline.collect  # type: ignore[attr-defined]

    def fails(*arguments: Any, **options: Any) -> Any:
        if rank == 1:
            raise torch.OutOfMemoryError("the rollout takes more than there is")
        return collect(*arguments, **options)

    pipeline.collect = fails  # type: ignore[attr-defined]


def no_room_for_the_log(rank: int) -> None:
    def fails(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    if rank == 0:
        RunLogger.step = fails  # type: ignore[method-assign]


def bad_on_one(rank: int) -> None:
    from grpo_fast import train

    if rank == 1:

        def fails(*_: Any, **__: Any) -> Any:
            raise UserError("the second one cannot do it")

        train.update = fails  # type: ignore[attr-defined]


def killed(rank: int) -> None:
    from grpo_fast import train

    if rank == 1:
        train.update = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prepare", "line"),
    [
        (no_memory_in_the_update, "out of memory"),
        (no_memory_in_the_rollout, "out of memory"),
        (no_room_for_the_log, "No space left on device"),
        (bad_on_one, "the second one cannot do it"),
        (killed, "rank 1 of 2 gave no sign of life"),
    ],
    ids=lambda value: getattr(value, "__name__", "-"),
)
def test_what_fails_on_one_ends_all_with_one_message(flags, tmp_path, prepare, line):
    began = time.monotonic()
    where = ["--output-dir", tmp_path, "--name", "run", "--run.steps", "3"]
    codes, said = train_on_ranks(2, [*flags, *where], tmp_path / "said.txt", prepare=prepare)
    assert time.monotonic() - began < 60
    assert all(code in (1, 2, -signal.SIGKILL) for code in codes), (codes, said)
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and re.search(line, errors[0]), said
    assert "Traceback" not in said


def test_sigterm_to_one_of_them_stops_all_with_everything_saved(flags, tmp_path):
    run = tmp_path / "run"

    def terminate(processes: list[int]) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not rows(run):
            time.sleep(0.1)
        os.kill(processes[1], signal.SIGTERM)

    where = ["--output-dir", tmp_path, "--name", "run", "--run.steps", "5000", "--run.save-every", "1000"]
    codes, said = train_on_ranks(2, [*flags, *where], tmp_path / "said.txt", meanwhile=terminate)
    assert codes == [130, 130], said
    assert said.count("stopped; go on with: python -m grpo_fast.train --resume") == 1, said
    newest = checkpoint.latest(run)
    assert newest is not None and checkpoint.verify(newest) is None
    assert newest.name == f"step-{rows(run)[-1]['step']:06d}"
