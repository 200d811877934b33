"""What alignment costs: GRPO, PPO and DPO on equal terms, in time, memory, FLOPs, tokens and reward calls.

    python -m benchmarks.cost --quick        two seeds, small: minutes
    python -m benchmarks.cost                five seeds: under an hour on two cores
    python -m benchmarks.cost --config my-run.toml --budget-wall 3600

Every algorithm chooses among as many settings as the others, by the reward model's score on a seed that counts no
further; then each is trained with every seed until the budget is used up. All of a seed begin with the same weights,
see the same prompts and the same frozen reward model, and are rated on the same held-out prompts by a judge that none
of them sees. Writes the record as JSON, a table, pictures and report.html. What is finished in the folder is not run
again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.cost.algorithms import ALGORITHMS
from benchmarks.cost.cell import Job, inputs_of, is_prepared
from benchmarks.cost.ledger import Budget
from benchmarks.cost.page import report
from benchmarks.cost.sweep import run_all
from benchmarks.cost.tables import terminal
from benchmarks.cost.terms import check_equal_terms
from benchmarks.machine import commit, device_name, versions
from benchmarks.page import command_line
from grpo_fast.config.command_line import parse
from grpo_fast.config.resolve import resolve_device
from grpo_fast.config.toml import to_toml
from grpo_fast.errors import UserError
from grpo_fast.run.command import Parser, prepare_libraries, run_command
from grpo_fast.run.metrics import finite, write_atomically

RESULTS = Path("benchmarks/results")
SEARCH_SEED = 100
"""Its runs choose the settings and count no further."""
KL_LIMIT = 15.0
"""Nats a completion from the start policy: the search takes nothing that has gone further."""
WHOLE = Budget(wall_s=40, generated_tokens=150_000, training_flops=800_000_000_000)
QUICK = Budget(wall_s=8, generated_tokens=30_000, training_flops=160_000_000_000, evaluations=4)
QUICK_CHOICES = {"dpo": {"batches": 3}}
"""What does not fit into the small budget otherwise: all pairs of offline DPO are made before its first step."""
SMALL = "--miniature.labelled 4000 --miniature.demonstrations 4000 --miniature.reward-epochs 2"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 after bad input, 1 where a run failed."""
    args = arguments(argv)
    prepare_libraries(0)
    began = time.monotonic()
    budget = budget_of(args)
    config = args.run_config
    inputs_of(config)
    choices, source = known_choices(args)
    claim(args, budget)
    prepare_models(args, budget)
    search: list[dict[str, Any]] = []
    if args.search == "on":
        search, source = searched(args, budget), "found by the search in this record"
        choices = best_choices(search)
    if args.quick:
        choices = {name: {**choice, **QUICK_CHOICES.get(name, {})} for name, choice in choices.items()}
    jobs = {
        args.folder / "cells" / f"{name}-{seed}.json": job_of(args, name, seed, budget, choices[name])
        for seed in args.seeds
        for name in args.algorithms
    }
    run_all(jobs, parallel=args.jobs, tell=tell)
    cells = [json.loads(path.read_text()) for path in jobs]
    record = record_of(args, budget, cells, search, choices, source) | {"wall_s": time.monotonic() - began}
    record = finite(record)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    check_equal_terms(record)
    Console().print(terminal(record))
    print(f"record: {args.output}  report: {report(record, args.folder, args.output)}")
    return 1 if any(cell["status"] == "failed" for cell in cells) else 0


def arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line, checked."""
    parser = Parser(
        prog="python -m benchmarks.cost", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two seeds, small models' worth of everything, no search"
    )
    parser.add_argument(
        "--config", help="settings of grpo_fast.train (TOML): your model, prompts, reward models"
    )
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2 3 4")
    parser.add_argument("--search", choices=("on", "off"), help="default on; off with --quick")
    parser.add_argument(
        "--choices",
        type=Path,
        help="without search: settings from this record; the miniature's default is the committed one",
    )
    parser.add_argument("--budget-wall", type=float, help="seconds")
    parser.add_argument("--budget-tokens", type=float, help="generated tokens")
    parser.add_argument("--budget-tflops", type=float, help="training FLOPs, in units of 10^12")
    parser.add_argument("--eval-size", type=int, default=128, help="held-out prompts of each evaluation")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, help="runs at a time; default one a core, one on a GPU")
    parser.add_argument("--threads", type=int, help="of each run; default: the cores shared out")
    parser.add_argument(
        "--folder", type=Path, help="where runs are kept; default runs/cost or runs/cost-quick"
    )
    parser.add_argument(
        "--output", type=Path, help="default benchmarks/results/cost-cpu.json, cost-quick-cpu.json"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="forget what other settings left in the folder"
    )
    args = parser.parse_args(argv)
    args.flags = ["--config", args.config] if args.config else SMALL.split() if args.quick else []
    args.run_config = parse([*args.flags, "--data.eval-size", str(args.eval_size)]).config
    args.device = resolve_device(args.run_config).type
    stem = "cost-quick" if args.quick else "cost"
    args.seeds = args.seeds or ([0, 1] if args.quick else [0, 1, 2, 3, 4])
    args.search = args.search or ("off" if args.quick else "on")
    given = [name for name in ("jobs", "threads", "eval_size") if getattr(args, name) is not None]
    for name in given:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    small = args.device == "cpu" and not args.run_config.policy.model
    args.jobs = args.jobs or (cores if small else 1)
    args.threads = args.threads or max(1, cores // args.jobs)
    args.folder = args.folder or Path("runs") / (f"{stem}-{Path(args.config).stem}" if args.config else stem)
    own = args.folder / "record.json"  # the user's own models have nothing to do with what is committed
    args.output = args.output or (own if args.config else RESULTS / f"{stem}-{args.device}.json")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must differ, got {' '.join(map(str, args.seeds))}")
    if SEARCH_SEED in args.seeds and args.search == "on":
        raise UserError(f"--seeds: {SEARCH_SEED} is the search's; take another, or --search off")
    return args


def budget_of(args: Namespace) -> Budget:
    """What every run may spend; of one that is given in one currency, only that one counts."""
    given = {
        "wall_s": args.budget_wall,
        "generated_tokens": args.budget_tokens,
        "training_flops": args.budget_tflops and args.budget_tflops * 1e12,
    }
    for name, amount in given.items():
        if amount is not None and not amount > 0:
            raise UserError(f"the budget of {name} must be positive, got {amount}")
    budget = QUICK if args.quick else WHOLE
    if not any(given.values()) and args.run_config.policy.model:
        raise UserError("--budget-wall SECONDS is needed for a model of your own")
    if not any(given.values()):
        return budget
    if args.budget_wall is None:
        raise UserError(
            "--budget-wall is needed beside the other budgets: a run ends after 1.5 times that at the latest"
        )
    amounts = {name: amount or 0.0 for name, amount in given.items()}
    return replace(budget, **amounts)


def job_of(
    args: Namespace, algorithm: str, seed: int, budget: Budget, choice: dict[str, Any] | None = None
) -> Job:
    """One cell's job."""
    return Job(
        algorithm=algorithm,
        seed=seed,
        choice=dict(choice or {}),
        flags=[*args.flags, "--data.eval-size", str(args.eval_size)],
        budget=asdict(budget),
        folder=str(args.folder / f"seed-{seed}"),
        threads=args.threads,
    )


def known_choices(args: Namespace) -> tuple[dict[str, dict[str, Any]], str]:
    """The settings of every algorithm where nothing is searched, and where they come from; UserError for a bad file."""
    nothing: dict[str, dict[str, Any]] = {name: {} for name in args.algorithms}
    own = args.run_config.policy.model or args.run_config.reward.model
    path = args.choices or RESULTS / "cost-cpu.json"
    if args.search == "on" or (args.choices is None and (own or not path.is_file())):
        return nothing, "as they are written"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["algorithms"]
        found = {name: dict(known[name]["choice"]) for name in args.algorithms if name in known}
        for name, choice in found.items():
            ALGORITHMS[name].chosen(choice)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--choices {path}: is no record of this benchmark that fits ({error}); give one, or --search on"
        ) from None
    return nothing | found, f"those of {path}"


def claim(args: Namespace, budget: Budget) -> None:
    """Mark the folder as this comparison's; UserError where it holds something else, unless --overwrite."""
    mark = args.folder / "settings.json"
    wanted = asdict(job_of(args, "", 0, budget)) | {"config": to_toml(args.run_config)}
    if not mark.is_file():
        if args.folder.is_dir() and any(args.folder.iterdir()):
            raise UserError(f"--folder {args.folder} holds something else: choose one that is new")
    elif json.loads(mark.read_text()) != wanted:
        if not args.overwrite:
            raise UserError(
                f"{args.folder} holds the runs of other settings: choose another --folder, or --overwrite"
            )
        shutil.rmtree(args.folder)
    args.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, json.dumps(wanted, indent=1))


def prepare_models(args: Namespace, budget: Budget) -> None:
    """The miniature's start policy and reward model of every seed; a user's own are there already."""
    if args.run_config.policy.model:
        return
    seeds = [*args.seeds, *([SEARCH_SEED] if args.search == "on" else [])]
    jobs = {}
    for seed in seeds:
        folder = args.folder / f"seed-{seed}"
        if not is_prepared(folder, args.run_config):
            shutil.rmtree(folder, ignore_errors=True)
            jobs[args.folder / f"models-{seed}.json"] = job_of(args, "", seed, budget)
    run_all(jobs, parallel=args.jobs, tell=tell)
    for seed in seeds:
        if not is_prepared(args.folder / f"seed-{seed}", args.run_config):
            raise UserError(
                f"the models of seed {seed} could not be made: {args.folder / f'models-{seed}.log'}"
            )


def grid_of(args: Namespace, name: str) -> list[dict[str, Any]]:
    """The settings an algorithm chooses from; what needs a reward model has something else in its place without one."""
    alone = bool(args.run_config.policy.model) and not args.run_config.reward.model
    grid = [dict(choice) for choice in ALGORITHMS[name].grid]
    for choice in grid if alone else ():
        if choice.pop("value_from", None):
            choice["epochs"] = 1
    return grid


def searched(args: Namespace, budget: Budget) -> list[dict[str, Any]]:
    """Every algorithm with every choice of its grid, on a seed of its own, for half the seconds."""
    half = replace(budget, wall_s=budget.wall_s / 2, generated_tokens=0.0, training_flops=0.0, evaluations=1)
    jobs = {
        args.folder / "search" / f"{name}-{index}.json": job_of(args, name, SEARCH_SEED, half, choice)
        for index in range(max(len(ALGORITHMS[name].grid) for name in args.algorithms))
        for name in args.algorithms
        for choice in grid_of(args, name)[index : index + 1]
    }
    run_all(jobs, parallel=args.jobs, tell=tell)
    found = []
    for path, job in jobs.items():
        cell = json.loads(path.read_text())
        last = cell["curve"][-1] if cell["curve"] else {}
        found.append(
            {
                "algorithm": job.algorithm,
                "choice": job.choice,
                "settings": cell["settings"],
                "seed": job.seed,
                "status": cell["status"],
                "why": cell["why"],
                "quality": last.get("score"),
                "kl": last.get("kl"),
                "at": {key: value for key, value in last.items() if key not in ("judge", "reward")},
            }
        )
    return found


def best_choices(search: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of every algorithm the choice with the highest score of the reward model, which a user has, not the judge's.

    Only among those that stay within `KL_LIMIT` of the start policy, as far as there are any (else the nearest one):
    further out a reward model's scores say little (arXiv 2210.10760). One that diverged is taken only where all did.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in search:
        now = best.get(row["algorithm"])
        if now is None or _rank(row) > _rank(now):
            best[row["algorithm"]] = row
    return {name: row["choice"] for name, row in best.items()}


def _rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
    quality, kl = row["quality"], row["kl"]
    if quality is None or kl is None or not math.isfinite(quality) or not math.isfinite(kl):
        return False, False, -math.inf
    near = kl <= KL_LIMIT
    return row["status"] == "finished", near, quality if near else -kl


def record_of(
    args: Namespace,
    budget: Budget,
    cells: list[dict[str, Any]],
    search: list[dict[str, Any]],
    choices: dict[str, dict[str, Any]],
    source: str,
) -> dict[str, Any]:
    """Everything that was measured."""
    config = args.run_config
    rollout, miniature = config.rollout, config.miniature
    measured = [cell for cell in cells if cell["curve"]]
    return {
        "benchmark": "cost",
        "command": command_line(),
        "config": to_toml(config),
        "device": device_name(args.device),
        "threads": args.threads,
        "jobs": args.jobs,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, **versions()},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "quick": args.quick,
        "budget": {name: amount for name, amount in asdict(budget).items() if amount != float("inf")},
        "work": {
            "model": config.policy.model
            or f"miniature, hidden {miniature.hidden}, {miniature.layers} layers",
            "parameters": measured[0]["parameters"] if measured else None,
            "heldout_prompts": args.eval_size,
            "sequences_per_step": rollout.prompts_per_step * rollout.group_size,
            "group_size": rollout.group_size,
            "max_new_tokens": rollout.max_new_tokens,
            "quality": measured[0]["quality"] if measured else None,
        },
        "algorithms": {
            name: {
                "title": ALGORITHMS[name].title,
                "family": ALGORITHMS[name].family,
                "choice": choices[name],
                "settings": asdict(ALGORITHMS[name].chosen(choices[name])),
            }
            for name in args.algorithms
        },
        "settings_source": source,
        "kl_limit": KL_LIMIT,
        "search": search,
        "cells": cells,
    }


def tell(line: str) -> None:
    """A line for the user, at once."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
