"""A world small enough to run every algorithm of the cost benchmark in seconds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cost.cell import Job, inputs_of, prepare_seed
from benchmarks.cost.lab import Lab
from benchmarks.cost.ledger import Budget, Ledger
from grpo_fast.engines.base import RolloutEngine
from grpo_fast.engines.choose import builtin_engine
from grpo_fast.miniature.setup import assemble
from tests.tiny import write_config

STEPS = {"steps": 2}


def job(folder: Path, algorithm: str = "", **choice: Any) -> Job:
    """A job in the tiny world of `folder`, of two steps."""
    settings = folder / "tiny.toml"
    if not settings.is_file():
        write_config(settings)
    return Job(
        algorithm=algorithm,
        seed=0,
        choice=choice,
        flags=["--config", str(settings)],
        budget=dict(STEPS),
        folder=str(folder / "seed-0"),
        threads=1,
    )


def prepared(folder: Path) -> Path:
    """The folder with the tiny world's start policy and reward model in it."""
    work = job(folder)
    config = work.config()
    prepare_seed(work, config, inputs_of(config))
    return folder


def lab(
    folder: Path,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    engine: Callable[[RolloutEngine], RolloutEngine] = lambda engine: engine,
) -> Lab:
    """A lab in a prepared folder, without an examiner."""
    config = replace(job(folder), seed=seed).config()
    task = assemble(config, inputs_of(config), folder / "seed-0")
    built = engine(builtin_engine(task.policy, max_rows=64, decode=task.decode))
    ledger = Ledger(budget or Budget(steps=2), task.policy.device)
    return Lab.of(config, task, built, ledger, start=folder / "seed-0" / "start")
