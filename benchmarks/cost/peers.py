"""The baselines of `benchmarks.cost` against a peer's trainer of the same algorithm, so that neither is a straw man.

    python -m venv DPO && DPO/bin/pip install -c constraints.txt torch && DPO/bin/pip install trl==1.16.0
    python -m venv PPO && PPO/bin/pip install -c constraints.txt torch && PPO/bin/pip install trl==1.12.0
    python -m benchmarks.cost.peers --dpo-python DPO/bin/python --ppo-python PPO/bin/python

DPO is held against TRL's current trainer, PPO against TRL 1.12.0, the last release that ships one
(`trl.experimental.ppo`; 1.13.0 has none). Each peer runs in a Python of its own, from the same weights on the same data
with the same hyper-parameters; the trained policies are then examined by the same code. Writes JSON, prints a table.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.cell import Job, inputs_of, is_prepared, prepare_seed
from benchmarks.cost.duels import LIMITS, Duel, dpo_duel, ppo_duel
from benchmarks.cost.peer_table import table, verdict
from benchmarks.machine import commit, device_name, versions
from benchmarks.page import command_line, page_of
from grpo_fast.config.command_line import parse
from grpo_fast.errors import UserError
from grpo_fast.run.command import Parser, prepare_libraries, run_command
from grpo_fast.run.metrics import write_atomically

DUELS: dict[str, Callable[..., dict[str, Any]]] = {"dpo": dpo_duel, "ppo": ppo_duel}


def main(argv: Sequence[str] | None = None, duel: Duel | None = None) -> int:
    """The command line: train both sides of every duel, write the record, print the table."""
    parser = Parser(prog="python -m benchmarks.cost.peers", description=(__doc__ or "").splitlines()[0])
    for name in DUELS:
        parser.add_argument(
            f"--{name}-python", default="", help=f"Python of an environment with TRL's {name.upper()}"
        )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each side")
    parser.add_argument(
        "--models", type=Path, help="folder with start/ and reward_model/; default: trained in --folder"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/cost-peers"), help="where the files go")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cost-peers-cpu.json"))
    args = parser.parse_args(argv)
    pythons = {name: getattr(args, f"{name}_python") for name in DUELS}
    prepare_libraries(args.threads)
    models, config = args.models or args.folder / "world", parse([]).config
    if args.models and not is_prepared(models, config):
        raise UserError(
            f"--models {models}: needs start/ and reward_model/, as a run of grpo_fast.train leaves them"
        )
    if not is_prepared(models, config):
        _train_models(models, args.threads)
    record = measure(models, args.folder, duel or Duel(), pythons, args.seeds, args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, json.dumps(record, indent=1) + "\n")
    page_of(args.output, command=command_line())
    print(table(record))
    return 0


def measure(
    models: Path, folder: Path, duel: Duel, pythons: dict[str, str], seeds: Sequence[int], threads: int
) -> dict[str, Any]:
    """The record: every duel with every seed, the two sides beginning by turns.

    A duel that is finished in `folder` on the same terms, the commit among them, is not run again.
    """
    about = {"settings": asdict(duel), "threads": threads, "commit": commit()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in DUELS}
    for seed in seeds:
        for name, fight in DUELS.items():
            place = folder / f"{name}-{seed}"
            done = place / "duel.json"
            terms = json.loads(json.dumps(about | {"python": pythons[name]}))
            kept = json.loads(done.read_text()) if done.is_file() else {}
            if kept.get("terms") != terms:
                print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
                python = pythons[name]
                found = fight(models, place, duel, seed, python, threads, ours_first=seed % 2 == 0)
                kept = {"terms": terms, "run": found}
                write_atomically(done, json.dumps(kept, indent=1))
            runs[name].append(kept["run"])
    return {
        "benchmark": "cost-peers",
        "device": device_name("cpu"),
        "versions": {"torch": torch.__version__, **versions()},
        **about,
        "limits": LIMITS,
        "duels": {name: {"runs": found, "verdict": verdict(found)} for name, found in runs.items()},
    }


def _train_models(folder: Path, threads: int) -> None:
    """The miniature's start policy and reward model of seed 0."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--device", "cpu"]
    job = Job(algorithm="", seed=0, choice={}, flags=flags, budget={}, folder=str(folder), threads=threads)
    config = job.config()
    prepare_seed(job, config, inputs_of(config))


if __name__ == "__main__":
    run_command(main)
