"""Settings compared by training: every variant with every seed on the miniature, and one table of what came out.

`python -m benchmarks.variants advantage-modes --seeds 0 1 2 3 4 --jobs 2` trains every advantage mode from the same
warm-started policy and the same reward model of a seed, writes the JSON, and prints the Markdown table. Quality is the
rule judge's on held-out prompts, which training never sees. A run that is finished in the folder is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.machine import commit, device_name, versions
from benchmarks.page import command_line, page_of
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import read_rows, read_summary, write_atomically

SUITES: dict[str, dict[str, list[str]]] = {
    "advantage-modes": {
        mode: ["--advantage.mode", mode]
        for mode in ("scalarized", "per_head", "gdpo", "dvao", "leave_one_out")
    },
}
FALL = 0.02
"""An objective has fallen between two evaluations when the judge's mean is lower by more than this (about one
standard error of 256 prompts)."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: train what is missing, write the JSON, print the table."""
    parser = Parser(prog="python -m benchmarks.variants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; the cores are shared out")
    parser.add_argument("--folder", type=Path, default=Path("runs/variants"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/<suite>.json")
    args = parser.parse_args(argv)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, maxtasksperchild=1) as pool:
        pool.starmap(_prepare, [(args.folder, seed, threads) for seed in args.seeds], chunksize=1)
        wanted = [
            (args.folder, args.suite, name, seed, threads)
            for seed in args.seeds
            for name in SUITES[args.suite]
        ]
        for number, run in enumerate(pool.imap(_train, wanted, chunksize=1), start=1):
            print(f"{number}/{len(wanted)} {run}", file=sys.stderr, flush=True)
    record = collect(args.folder, args.suite, args.seeds)
    output = args.output or Path("benchmarks/results") / f"{args.suite}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(record, indent=1))
    page_of(output, command=command_line())
    print(table(record))
    return 0


def _prepare(folder: Path, seed: int, threads: int) -> None:
    """The start policy and the reward model of a seed, trained once for all variants."""
    shared = folder / f"seed-{seed}"
    if not (shared / "reward_model" / "quality.json").is_file():
        shutil.rmtree(shared, ignore_errors=True)
        _run(folder, shared.name, ["--seed", str(seed), "--run.steps", "1", "--data.eval-size", "8"], threads)


def _train(job: tuple[Path, str, str, int, int]) -> Path:
    folder, suite, variant, seed, threads = job
    run = folder / f"{variant}-{seed}"
    if (read_summary(run) or {}).get("status") != "finished":
        shutil.rmtree(run, ignore_errors=True)
        flags = [
            "--seed",
            str(seed),
            "--run.eval-every",
            "10",
            "--run.save-every",
            "0",
            *SUITES[suite][variant],
        ]
        _run(folder, run.name, flags, threads, lent=folder / f"seed-{seed}")
    return run


def _run(folder: Path, name: str, flags: list[str], threads: int, lent: Path | None = None) -> None:
    """One run in this process, its display in `<folder>/<name>.log`; `lent` is a run whose models it begins with."""
    from grpo_fast.config.command_line import parse
    from grpo_fast.config.toml import to_toml
    from grpo_fast.miniature.world import OBJECTIVES
    from grpo_fast.run.live import Run
    from grpo_fast.run.metrics import RunLogger
    from grpo_fast.task import check_inputs
    from grpo_fast.train import train

    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (folder / f"{name}.log").open("w")
    torch.set_num_threads(threads)
    config = parse([*flags, "--name", name, "--output-dir", str(folder)]).config
    with Run(RunLogger.create(folder / name, config_toml=to_toml(config))) as run:
        for model in ("start", "reward_model") if lent else ():
            shutil.copytree(Path(str(lent)) / model, run.path / model)
        train(config, check_inputs(config, own_heads=OBJECTIVES), run)


def collect(folder: Path, suite: str, seeds: Sequence[int]) -> dict[str, Any]:
    """What every run of a suite came to, from the files of the runs."""
    runs = []
    for variant in SUITES[suite]:
        for seed in seeds:
            run = folder / f"{variant}-{seed}"
            summary = read_summary(run) or {}
            rows = [row for row in read_rows(run / "metrics.jsonl") if "eval/judge/safety" in row]
            names = list(summary["objectives"])
            judged = [[summary["objectives"][name]["judge_before"]["mean"] for name in names]]
            judged += [[row[f"eval/judge/{name}"] for name in names] for row in rows]
            judged += [[summary["objectives"][name]["judge_after"]["mean"] for name in names]]
            runs.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "flags": SUITES[suite][variant],
                    "objectives": names,
                    "judged": judged,
                    "over_refusal": [summary["over_refusal"][when]["mean"] for when in ("before", "after")],
                }
            )
    return {
        "suite": suite,
        "commit": commit(),
        "device": device_name("cpu"),
        "versions": {"torch": torch.__version__, **versions()},
        "runs": runs,
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: mean ± standard deviation over the seeds of each variant's gains on held-out prompts."""
    names = record["runs"][0]["objectives"]
    head = ["variant", *names, "mean of all", "worst objective", "over-refusal", "fell while the mean rose"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant in dict.fromkeys(run["variant"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["variant"] == variant]
        gains = [
            [after - before for before, after in zip(r["judged"][0], r["judged"][-1], strict=True)]
            for r in runs
        ]
        columns = [[gain[k] for gain in gains] for k in range(len(names))]
        columns += [[mean(gain) for gain in gains], [min(gain) for gain in gains]]
        columns += [[r["over_refusal"][1] - r["over_refusal"][0] for r in runs]]
        falls = [falls_while_rising(run["judged"]) for run in runs]
        cells = [_spread(column) for column in columns]
        fell = f"{sum(f for f, _ in falls)} of {sum(n for _, n in falls)}"
        lines.append(f"| {variant} | {' | '.join(cells)} | {fell} |")
    return "\n".join(lines)


def falls_while_rising(judged: list[list[float]]) -> tuple[int, int]:
    """(intervals between evaluations in which the mean rose and an objective fell by more than FALL, those in which
    the mean rose)."""
    rising = [(a, b) for a, b in pairwise(judged) if mean(b) > mean(a)]
    return sum(any(x - y > FALL for x, y in zip(a, b, strict=True)) for a, b in rising), len(rising)


def _spread(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):+.3f}{spread}"


if __name__ == "__main__":
    run_command(main)
