"""Runs that are killed at random moments, and what they come to: `python -m tests.endurance.kills [--kills 20]`.

Each is killed by SIGKILL, resumed, and compared with a run that was never disturbed: metrics without clocks and the
final weights must be the same to the bit, and no more steps may be lost than lie between two checkpoints (and those
that were taken while the last one was written). Kinds of run take turns: everything trained, an adapter, 8-bit states,
a batch generated ahead, the miniature from its warm start on. Of five kills one happens inside a save on a slow disk,
and one in a run that found its disk full before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from benchmarks.machine import commit, device_name
from grpo_fast.run import checkpoint
from grpo_fast.run.metrics import read_rows, reproducible
from tests.tiny import TINY_MINIATURE, save_policy, write_config, write_prompts

RESULTS = Path(__file__).parent / "results" / "kills.json"
STEPS, INTERVAL = 20, 4
LIMIT_S = 240.0
REWARDS = """
def counts_e(prompts, completions, **columns):
    return [sum(letter == "e" for letter in text) / 16 for text in completions]
"""
OWN = (
    "--policy.model {folder}/llama --data.prompts {folder}/prompts.jsonl --data.eval-size 4 --reward.functions "
    "killed_rewards:counts_e --rollout.prompts-per-step 4 --rollout.group-size 4 --rollout.max-new-tokens 12 "
    "--optim.lr 1e-2"
)
KINDS = {
    "everything": OWN + " --loss.kl-coef 0.05",
    "adapter": OWN + " --policy.lora-rank 4",
    "8-bit states": OWN + " --optim.optimizer adamw8bit",
    "ahead": OWN + " --rollout.ahead --loss.mismatch truncate --rollout.refill 1 --rollout.rest 2",
    "miniature": "--config {folder}/tiny.toml",
}


@dataclass
class Outcome:
    """One killed run."""

    kind: str
    moment: str
    """at random, inside a save, or after the disk was full"""
    after_s: float
    """From the start of the process to the kill"""
    logged: int
    """Steps that were logged when it was killed"""
    resumed_from: int
    lost: int
    saving: bool
    """Whether a checkpoint was being written"""
    identical: bool
    """Metrics and weights, with those of a run that was never disturbed"""
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Kill, resume, compare; exit code 1 where a run did not come to the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        outcomes = kills(Path(name), asked.kills, asked.seed, asked.kinds, console)
    good = all(outcome.identical and outcome.lost <= allowed(outcome) for outcome in outcomes)
    record = {
        "commit": commit(),
        "device": device_name("cpu"),
        "seed": asked.seed,
        "steps": STEPS,
        "interval": INTERVAL,
        "identical": sum(outcome.identical for outcome in outcomes),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    asked.output.parent.mkdir(exist_ok=True)
    asked.output.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"{record['identical']} of {len(outcomes)} came to the same, to the bit: {asked.output}")
    return 0 if good else 1


def allowed(outcome: Outcome) -> int:
    """Steps that may be lost: an interval, and another one where a checkpoint was being written or found no room."""
    return INTERVAL * (2 if outcome.saving or outcome.moment == "after a full disk" else 1)


class Started(Protocol):
    """A process, as `subprocess` has it."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, signal: int, /) -> None: ...


def words_of(
    folder: Path, kind: str, name: str, resume: Path | None, disk: tuple[str, ...]
) -> tuple[str, list[str], Path]:
    """(module, its words, the file for what it says) of a run."""
    flags = KINDS[kind].format(folder=folder).split()
    flags += ["--output-dir", str(folder / "runs"), "--name", name]
    flags += f"--run.steps {STEPS} --run.save-every {INTERVAL} --run.eval-every 6 --threads 1".split()
    if resume is not None:
        flags = ["--resume", str(resume)]
    (folder / "output").mkdir(exist_ok=True)
    said = folder / "output" / f"{name}.txt"
    return ("tests.endurance.disk", [*disk, "--", *flags], said) if disk else ("grpo_fast.train", flags, said)


def start(
    folder: Path, kind: str, name: str, *, resume: Path | None = None, disk: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """The command in a process of its own; what it says goes beside the run."""
    module, words, said = words_of(folder, kind, name, resume, disk)
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{root}:{root / 'kernels'}:{folder}", "OMP_NUM_THREADS": "1"}
    with said.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdout=output,
            stderr=output,
            cwd=folder,
            env=inherited() | environment,
        )


MOMENTS = ("at random", "at random", "inside a save", "at random", "after a full disk")


def kills(
    folder: Path,
    count: int,
    seed: int,
    kinds: list[str],
    console: Console,
    *,
    moments: tuple[str, ...] = MOMENTS,
    start: Callable[..., Started] = start,
) -> list[Outcome]:
    """`count` runs, one after the other, their processes by `start`."""
    (folder / "killed_rewards.py").write_text(REWARDS)
    save_policy(folder / "llama", "llama")
    write_prompts(folder / "prompts.jsonl")
    write_config(folder / "tiny.toml", TINY_MINIATURE)
    draw = random.Random(seed)
    straight: dict[str, tuple[Path, float]] = {}
    outcomes = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind not in straight:
            started = time.monotonic()
            run = folder / "runs" / f"straight {kind}"
            process = start(folder, kind, run.name)
            assert process.wait(LIMIT_S) == 0, said(folder, run)
            straight[kind] = run, time.monotonic() - started
        # another one for each kind in turn
        moment = moments[(number + number // len(moments)) % len(moments)]
        outcome = killed(folder, kind, moment, number, straight[kind], draw, start)
        outcomes.append(outcome)
        console.print(
            f"{number + 1}/{count} {kind}, {moment}: killed after {outcome.after_s:.1f} s at step {outcome.logged}, "
            f"{outcome.lost} lost, {'the same' if outcome.identical else 'NOT THE SAME'}"
        )
    return outcomes


def killed(
    folder: Path,
    kind: str,
    moment: str,
    number: int,
    straight: tuple[Path, float],
    draw: random.Random,
    start: Callable[..., Started],
) -> Outcome:
    """Start a run, kill it, resume it to its end."""
    began = time.monotonic()
    undisturbed, usual_s = straight
    run = folder / "runs" / f"killed {number}"
    disk: tuple[str, ...] = ()
    if moment == "inside a save":
        disk = ("--slow", "0.3")
    elif moment == "after a full disk":
        disk = ("--full", str(draw.randint(3, 9)))
    process = start(folder, kind, run.name, disk=disk)
    if moment == "after a full disk":
        assert process.wait(LIMIT_S) == 2, "a run on a full disk must end with one line"
        process = start(folder, kind, run.name, resume=run)  # there is room again
    # a third while it starts (and warms up), the others at any step
    early_s = draw.uniform(0.1, 0.8) * usual_s if draw.random() < 1 / 3 else None
    step, a_little = draw.randrange(STEPS), draw.uniform(0, 0.3)
    saves = draw.randint(1, STEPS // INTERVAL - 1)
    started = time.monotonic()
    while process.poll() is None:
        if moment == "inside a save":
            newest = max(map(step_in, whole(run)), default=0)
            if writing(run) is not None and newest >= INTERVAL * (saves - 1):
                time.sleep(a_little)
                break
        elif early_s is None and steps_of(run) > step:
            time.sleep(a_little)
            break
        elif early_s is not None and time.monotonic() - started > early_s:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    after_s = time.monotonic() - started
    logged = steps_of(run)
    saving = writing(run) is not None
    newest = checkpoint.latest(run)
    assert newest is None or checkpoint.verify(newest) is None, f"{newest} is not whole"
    came_from = step_in(newest) if newest else 0
    for _ in range(3):  # a run that was killed before it had a folder begins anew
        finished = json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else {}
        if finished.get("status") == "finished":
            break
        process = start(folder, kind, run.name, resume=run if (run / "config.toml").is_file() else None)
        assert process.wait(LIMIT_S) == 0, said(folder, run)
    return Outcome(
        kind=kind,
        moment=moment,
        after_s=round(after_s, 2),
        logged=logged,
        resumed_from=came_from,
        lost=max(0, logged - came_from),
        saving=saving,
        identical=fingerprint(run) == fingerprint(undisturbed),
        seconds=round(time.monotonic() - began, 1),
    )


def said(folder: Path, run: Path) -> str:
    """What a run has printed."""
    return (folder / "output" / f"{run.name}.txt").read_text()


def inherited() -> dict[str, str]:
    """This process's environment, without what makes a run one of several."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}


def writing(run: Path) -> Path | None:
    """The checkpoint that is being written."""
    return next((run / "checkpoints").glob(".step-*.tmp*"), None)


def whole(run: Path) -> list[Path]:
    """The checkpoints that are there."""
    return list((run / "checkpoints").glob("step-*"))


def step_in(path: Path) -> int:
    """The finished steps of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def steps_of(run: Path) -> int:
    """Steps of GRPO that a run has logged."""
    rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    return max((row["step"] for row in rows if row["phase"] == "grpo"), default=0)


def fingerprint(run: Path) -> tuple[list[str], dict[str, str]]:
    """Metrics without clocks, and a checksum of every file of weights."""
    rows = [json.dumps(reproducible(row), sort_keys=True) for row in read_rows(run / "metrics.jsonl")]
    files = sorted((run / "model").glob("*.safetensors"))
    assert files, f"{run} has no model"
    return rows, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    sys.exit(main())
