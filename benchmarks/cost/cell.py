"""One run of one algorithm with one seed, in a process of its own: `python -m benchmarks.cost.cell JOB RESULT`.

JOB is a file that `sweep` has written; the cell goes into the file RESULT, whole or not at all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.algorithms import ALGORITHMS
from benchmarks.cost.examiner import Examiner, fingerprint
from benchmarks.cost.lab import Lab, reward_models
from benchmarks.cost.ledger import PHASES, Budget, Diverged, Ledger
from benchmarks.machine import commit, device_name, versions
from grpo_fast.config.command_line import parse
from grpo_fast.config.resolve import resolve_device
from grpo_fast.config.settings import TrainConfig
from grpo_fast.config.toml import to_toml
from grpo_fast.engines.choose import engine_of
from grpo_fast.errors import UserError
from grpo_fast.miniature.setup import assemble, prepare
from grpo_fast.miniature.world import OBJECTIVES
from grpo_fast.run.command import prepare_libraries, run_command
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import RunLogger, write_atomically
from grpo_fast.task import Inputs, Task, check_inputs, load


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is asked to do."""

    algorithm: str
    """Empty: prepare the models of the seed and nothing else"""
    seed: int
    choice: dict[str, Any]
    """Fields of the algorithm's settings with other values"""
    flags: list[str]
    """Of `grpo_fast.train`: the run's settings"""
    budget: dict[str, Any]
    folder: str
    """Of the seed's models, where the miniature's are trained"""
    threads: int

    def config(self) -> TrainConfig:
        """The run's settings."""
        return parse([*self.flags, "--seed", str(self.seed)]).config


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 also where the run diverged or failed: the cell says so."""
    job_file, result = argv or sys.argv[1:]
    job = Job(**json.loads(Path(job_file).read_text()))
    prepare_libraries(job.threads)
    config = job.config()
    inputs = inputs_of(config)
    if not job.algorithm:
        prepare_seed(job, config, inputs)
        return 0
    write_atomically(Path(result), json.dumps(run(job, config, inputs), indent=1) + "\n")
    return 0


def inputs_of(config: TrainConfig) -> Inputs:
    """The user's prompts and reward models, checked."""
    return check_inputs(config, own_heads=() if config.policy.model or config.reward.model else OBJECTIVES)


def prepare_seed(job: Job, config: TrainConfig, inputs: Inputs) -> None:
    """The miniature's start policy and reward model of a seed, where they are not there yet."""
    folder = Path(job.folder)
    with Run(RunLogger.create(folder, config_toml=to_toml(config))) as run:
        prepare(config, inputs, run)


def is_prepared(folder: Path, config: TrainConfig) -> bool:
    """Whether a seed's models are all there; the reward model may be the user's."""
    scored = bool(config.reward.model) or (folder / "reward_model" / "quality.json").is_file()
    return scored and (folder / "start" / "config.json").is_file()


def run(job: Job, config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """The cell: what the run cost and what came of it, whatever that is."""
    algorithm = ALGORITHMS[job.algorithm]
    settings = algorithm.chosen(job.choice)
    task = load(config, inputs) if config.policy.model else assemble(config, inputs, Path(job.folder))
    start = Path(config.policy.model) if config.policy.model else Path(job.folder) / "start"
    marks = marks_of(task)
    engine = engine_of(config, task.policy, Path(job.folder), decode=task.decode, tell=_tell)
    examiner = Examiner(task, engine, config)
    ledger = Ledger(Budget(**job.budget), resolve_device(config), examiner)
    lab = Lab.of(config, task, engine, ledger, start=start)
    status, why = attempt(lambda: algorithm.train(lab, settings), examiner)
    engine.close()
    if fingerprint(*lab.reward_models) != marks["reward_model"]:
        raise AssertionError(f"{job.algorithm} has changed the reward model")
    return {
        "algorithm": job.algorithm,
        "seed": job.seed,
        "settings": asdict(settings),
        "status": status,
        "why": why,
        "device": device_name(task.policy.device.type),
        "commit": commit(),
        "versions": {"torch": torch.__version__, **versions()},
        "threads": torch.get_num_threads(),
        "quality": "judge" if task.judge else "reward",
        "parameters": sum(p.numel() for p in task.policy.parameters()),
        "fingerprint": marks,
        "memory": ledger.memory(),
        "phase_s": {name: ledger.phase_s[name] for name in PHASES},
        "flops": {name: ledger.flops[name] for name in PHASES},
        "curve": ledger.curve,
    }


def marks_of(task: Task) -> dict[str, str]:
    """What must be equal in every run of a seed."""
    return {
        "start": fingerprint(task.policy.model),
        "reward_model": fingerprint(*reward_models(task)),
        "prompts": fingerprint(task.prompts),
        "heldout": fingerprint(task.heldout),
    }


def attempt(train: Callable[[], None], examiner: Examiner) -> tuple[str, str | None]:
    """Status of a run, and why it is not `finished`: a run that diverges is a result like any other."""
    try:
        train()
    except (Diverged, FloatingPointError) as error:
        return "diverged", str(error)
    except (UserError, torch.OutOfMemoryError) as error:
        # the guard around the engine says in its own words that the weights are no longer finite
        status = "diverged" if isinstance(error.__context__, FloatingPointError) else "failed"
        return status, " ".join(str(error).split())
    if examiner.worse():
        return "diverged", "worse than the start policy, by more than three standard errors"
    return "finished", None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
