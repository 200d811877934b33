"""A policy trained against a reward model that can be gamed: is it caught, and does a lower bound help?

    python -m benchmarks.overoptimisation --seeds 0 1 2

The reward models are trained on a few hundred labelled replies of the unaligned policy alone, so they have never seen
what an optimiser comes up with (steps said again and again, tips without end). One run of GRPO maximises the scores of
one of them, without a KL term; the other the lower bound mean - k * spread of an ensemble of four. The rule judge,
which neither sees, says what the replies are worth. Writes JSON with the curves and the steps of the warnings, and a
plot.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.machine import commit, device_name, versions
from benchmarks.page import command_line, page_of
from grpo_fast.miniature import world
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import read_rows, read_summary, write_atomically
from grpo_fast.trust.watch import Watch

OBJECTIVES = world.OBJECTIVES
MEMBERS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: train what is missing in the folder, write JSON and plot, print one line a seed."""
    parser = Parser(prog="python -m benchmarks.overoptimisation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labelled", type=int, default=600, help="labelled replies of the unaligned policy")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument(
        "--lr", type=float, default=5e-4, help="twice the miniature's: pressure is the point here"
    )
    parser.add_argument("--k", type=float, default=2.0, help="the lower bound is mean - k * spread")
    parser.add_argument("--folder", type=Path, default=Path("runs/overoptimisation"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overoptimisation.json"))
    args = parser.parse_args(argv)
    runs = []
    for seed in args.seeds:
        folder = args.folder / f"seed-{seed}"
        models = _reward_models(folder, seed, args.labelled)
        bounds = [f"{name}={args.k}" for name in OBJECTIVES]
        runs.append(
            {
                "seed": seed,
                "mean": _train(folder, "mean", seed, args, models[:1], []),
                "lower_bound": _train(
                    folder, "lower_bound", seed, args, models, ["--reward.lower-bounds", *bounds]
                ),
            }
        )
    record = {
        "benchmark": "overoptimisation",
        "commit": commit(),
        "device": device_name("cpu"),
        "versions": {"torch": torch.__version__, **versions()},
        "labelled": args.labelled,
        "members": MEMBERS,
        "k": args.k,
        "lr": args.lr,
        "runs": runs,
    }
    write_atomically(args.output, json.dumps(record, indent=1))
    plot(record, args.output.with_suffix(".png"))
    page_of(args.output, command=command_line())
    for run in runs:
        caught, held = run["mean"], run["lower_bound"]
        print(
            f"seed {run['seed']}: judge {caught['peak']:.3f} at step {caught['peak_step']}, {caught['judge'][-1]:.3f} "
            f"at the end, warned at step {caught['warned']}; with the lower bound {held['peak']:.3f} and "
            f"{held['judge'][-1]:.3f}: {held['fall'] / caught['fall']:.0%} of the fall"
        )
    return 0


def _reward_models(folder: Path, seed: int, labelled: int) -> list[Path]:
    """The start policy of a seed, and reward models on its backbone that know its own replies alone."""
    from grpo_fast.train import main as train
    from grpo_fast.train_reward import main as train_reward

    start = folder / "start" / "start"
    if not (start / "config.json").is_file():
        shutil.rmtree(folder / "start", ignore_errors=True)
        _call(
            train,
            f"--seed {seed} --name start --output-dir {folder} --run.steps 1 --data.eval-size 8 "
            "--miniature.labelled 64 --miniature.reward-epochs 1",
        )
    ratings = folder / "ratings.jsonl"
    examples = world.demonstrations("train", labelled, seed)
    labels = world.annotate([ask for ask, _ in examples], [reply for _, reply in examples], seed=seed)
    rows = [
        {
            "prompt": [{"role": "user", "content": ask.text}],
            "response": reply,
            **{name: None if math.isnan(x) else x for name, x in zip(OBJECTIVES, row, strict=True)},
        }
        for (ask, reply), row in zip(examples, labels, strict=True)
    ]
    write_atomically(ratings, "".join(json.dumps(row) + "\n" for row in rows))
    models = []
    for member in range(MEMBERS):
        run = folder / f"reward-{member}"
        models.append(run / "model")
        if not (run / "model" / "config.json").is_file():
            shutil.rmtree(run, ignore_errors=True)
            _call(
                train_reward,
                f"--seed {MEMBERS * seed + member} --name {run.name} --output-dir {folder} --backbone.model {start} "
                f"--data.ratings {ratings} --data.eval-size 100 --optim.lr 2e-3 --run.epochs 6",
            )
    return models


def _train(
    folder: Path, name: str, seed: int, args: Any, models: Sequence[Path], flags: Sequence[str]
) -> dict[str, Any]:
    """One run of GRPO from the start policy, and what came of it."""
    from grpo_fast.config.command_line import parse
    from grpo_fast.config.toml import to_toml
    from grpo_fast.run.live import Run
    from grpo_fast.run.metrics import RunLogger
    from grpo_fast.task import check_inputs
    from grpo_fast.train import train

    run_dir = folder / name
    if (read_summary(run_dir) or {}).get("status") != "finished":
        shutil.rmtree(run_dir, ignore_errors=True)
        words = f"--seed {seed} --name {name} --output-dir {folder} --run.steps {args.steps}".split()
        words += ["--optim.lr", str(args.lr)]
        words += ["--run.eval-every", "5", "--run.save-every", "0", "--loss.kl-coef", "0"]
        words += ["--reward.model", *map(str, models), *flags]
        config = parse(words).config
        with Run(RunLogger.create(run_dir, config_toml=to_toml(config))) as run:
            shutil.copytree(folder / "start" / "start", run_dir / "start")
            train(config, check_inputs(config), run)
    return _outcome(run_dir)


def _call(command: Callable[[list[str]], None], words: str) -> None:
    try:
        command(words.split())
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"error: {words} failed")


def _outcome(run: Path) -> dict[str, Any]:
    """Mean over the objectives of reward and judge at every evaluation, and the first warning."""
    objectives = (read_summary(run) or {})["objectives"]
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["phase"] == "grpo"]
    evaluated = [row for row in rows if "eval/judge/safety" in row]

    def curve(kind: str) -> list[float]:
        ends = [
            mean(o[f"{kind}_{when}"]["mean"] for o in objectives.values()) for when in ("before", "after")
        ]
        return [
            ends[0],
            *(mean(row[f"eval/{kind}/{name}"] for name in objectives) for row in evaluated),
            ends[1],
        ]

    judge = curve("judge")
    peak = max(range(len(judge)), key=judge.__getitem__)
    at = [0, *(row["step"] for row in evaluated), rows[-1]["step"]]
    watch, warned = Watch(), []
    for row in rows:
        plain = {key: value for key, value in row.items() if not key.startswith("warning/")}
        warned += [(row["step"], name) for name in watch.step(plain)]
    return {
        "step": at,
        "judge": judge,
        "reward": curve("reward"),
        "distance": [row.get("distance") for row in rows],
        "peak": judge[peak],
        "peak_step": at[peak],
        "fall": judge[peak] - judge[-1],
        "warnings": warned,
        "warned": warned[0][0] if warned else None,
    }


def plot(record: dict[str, Any], path: Path) -> None:
    """Reward and judge of both runs of every seed, and where the first warning stood."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $
    import matplotlib.pyplot as plt

    runs = record["runs"]
    figure, axes = plt.subplots(
        1, len(runs), figsize=(4.2 * len(runs), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, run in zip(axes[0], runs, strict=True):
        for name, colour in (("mean", "tab:red"), ("lower_bound", "tab:blue")):
            found, label = run[name], {"mean": "one model", "lower_bound": "lower bound of four"}[name]
            axis.plot(found["step"], found["reward"], "--", color=colour, lw=1, label=f"{label}: reward")
            axis.plot(found["step"], found["judge"], color=colour, lw=2, label=f"{label}: judge")
            if found["warned"]:
                height = {"mean": 0.22, "lower_bound": 0.34}[name]
                axis.axvline(found["warned"], color=colour, lw=0.8, ls=":")
                axis.text(found["warned"] + 0.5, height, "warning", rotation=90, color=colour, fontsize=8)
        axis.set(title=f"seed {run['seed']}", xlabel="GRPO step", ylim=(0.2, 1.0))
    axes[0, 0].set_ylabel("mean of four objectives")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main)
