"""What became slower since the committed baseline: the pytest-benchmark suite, compared test by test.

    python -m benchmarks.history              # measure and compare; exit code 1 where a test became slower
    python -m benchmarks.history --save       # and add the run to benchmarks/history/runs.jsonl
    python -m benchmarks.history --baseline   # measure a new baseline, benchmarks/history/baseline.json

The suite runs several times, each in a process of its own, so that what differs between runs of the same code is
known and not mistaken for a change (`benchmarks.compare`). What looks slower is measured once more by itself, and
counts only if it is slower again. On another machine than the baseline's, or with other threads or another clock, tests
are compared as multiples of the bare matrix products of the same run, and that is said.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Lines
from rich.text import Text

from benchmarks.compare import ANCHOR, Change, compare, differences, merged, thinned
from benchmarks.machine import commit, device_name, versions
from benchmarks.page import write_page
from benchmarks.tables import Table, cell
from grpo_fast.errors import UserError
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import write_atomically

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "history"
BASELINE, RUNS = "baseline.json", "runs.jsonl"
PEERS = "not liger and not compiled"
"""Other projects' contenders in the suite are not this project's history."""
ORDER = ("slower", "faster", "new", "gone", "same")
COLOURS = {"slower": "bold red", "faster": "green", "new": "cyan", "gone": "yellow", "same": "dim"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 where a test became slower by more than the noise."""
    parser = Parser(prog="python -m benchmarks.history", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--baseline", action="store_true", help="replace the baseline by this run")
    parser.add_argument("--save", action="store_true", help="add this run to the history")
    parser.add_argument("--repeats", type=int, default=0, help="runs of the suite (3; --baseline: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--clock",
        choices=("auto", "wall", "cpu"),
        default="auto",
        help="wall seconds, or processor seconds, which other processes do not disturb; auto: cpu for one thread "
        "without a GPU",
    )
    parser.add_argument(
        "--suite", nargs="+", default=["benchmarks"], help="files or tests, as pytest has them"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where baseline and history lie")
    args = parser.parse_args(argv)
    if args.repeats < 0 or args.threads < 1:
        raise UserError("--repeats must not be negative, --threads must be at least 1")
    if args.clock == "auto":
        args.clock = "cpu" if args.threads == 1 and not torch.cuda.is_available() else "wall"
    path = args.folder / BASELINE
    baseline = None if args.baseline else read_baseline(path)
    repeats = args.repeats or (5 if args.baseline else 3)
    run = measure(args.suite, repeats=repeats, threads=args.threads, clock=args.clock)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.save:
        _append(args.folder / RUNS, summary(run))
    if baseline is None:
        write_atomically(path, json.dumps(run, indent=None, separators=(",", ":")) + "\n")
        print(f"{path}: {len(run['tests'])} tests, {repeats} times")
        return 0
    changes = against(baseline, run)
    slower = [change.name for change in changes if change.verdict == "slower"]
    if slower:
        print(f"{len(slower)} look slower: measured again", file=sys.stderr, flush=True)
        again = measure(
            args.suite, repeats=repeats, threads=args.threads, clock=args.clock, only=[*slower, ANCHOR]
        )
        changes = confirmed(changes, against(baseline, again))
    show(changes, baseline, run)
    write_page(
        args.folder / "report.html",
        title="Against the baseline",
        what=(
            "The benchmark suite, several times, compared test by test with the baseline of "
            f"{baseline.get('date')}, commit {baseline.get('commit')}."
        ),
        record=run | run["machine"],
        tables=[table_of(changes)],
        notes=differences(baseline, run),
    )
    return 1 if any(change.verdict == "slower" for change in changes) else 0


def read_baseline(path: Path) -> dict[str, Any]:
    """The baseline; UserError where there is none or it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"no baseline to compare with ({path}: {error.strerror or error}); measure one with --baseline"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; measure a new one with --baseline") from error
    if not isinstance(found, dict) or not found.get("tests") or not isinstance(found.get("machine"), dict):
        raise UserError(f"{path} is no baseline; measure one with --baseline")
    return found


def against(baseline: Mapping[str, Any], run: Mapping[str, Any]) -> list[Change]:
    """`compare`, whose refusal is the user's to solve."""
    try:
        return compare(baseline, run)
    except ValueError as error:
        raise UserError(f"{error}; measure a baseline on this machine with --baseline") from error


def confirmed(changes: Sequence[Change], again: Sequence[Change]) -> list[Change]:
    """What was slower and is slower again stays so; the rest takes the second verdict."""
    second = {change.name: change for change in again}
    return [second.get(change.name, change) if change.verdict == "slower" else change for change in changes]


def measure(
    suite: Sequence[str], *, repeats: int, threads: int, clock: str, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the suite, or `only` these tests of it, `repeats` times and keep a few samples of each run.

    UserError where a test of it fails.
    """
    tests: dict[str, dict[str, Any]] = {}
    for repeat in range(repeats):
        print(f"suite, run {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        for name, samples in run_suite(suite, threads=threads, clock=clock, only=only).items():
            tests.setdefault(name, {"repeats": []})["repeats"].append(thinned(samples))
    if not tests:
        raise UserError(f"no benchmark in {', '.join(suite)}")
    return {
        "benchmark": "history",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
        "machine": machine(threads, clock),
        "tests": {
            name: {"median_s": statistics.median(merged(found)), **found} for name, found in tests.items()
        },
    }


def run_suite(
    suite: Sequence[str], *, threads: int, clock: str, only: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Seconds of every round of every test, the first round (warm-up) left out."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        functions = {name.rpartition("::")[2].partition("[")[0] for name in only}
        chosen = f"{PEERS} and ({' or '.join(sorted(functions))})" if only else PEERS
        command = [sys.executable, "-m", "pytest", *suite, "-q", "-p", "no:cacheprovider", "-k", chosen]
        command += ["--benchmark-only", "--benchmark-disable-gc", "--benchmark-min-rounds=6"]
        command += ["--benchmark-max-time=0.6", f"--benchmark-json={output}"]
        if clock == "cpu":
            command += ["--benchmark-timer=time.process_time"]
        # within another suite's worker the plugin would switch itself off
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 5) or not output.is_file():  # 5: no test there
            said = (done.stdout + done.stderr).strip().splitlines()
            errors = [line for line in said if line.startswith(("FAILED", "ERROR"))] or said[-1:]
            raise UserError(f"the suite did not run through: {errors[0] if errors else 'without a word'}")
        text = output.read_text(encoding="utf-8")
    found = {}
    for test in json.loads(text)["benchmarks"] if text.strip() else []:
        samples = test["stats"]["data"]
        if not only or test["fullname"] in only:
            found[test["fullname"]] = samples[1:] if len(samples) > 2 else samples
    return found


def machine(threads: int, clock: str) -> dict[str, Any]:
    """What the seconds are of."""
    cuda = torch.cuda.is_available()
    return {
        "device": device_name("cuda" if cuda else "cpu"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "clock": clock,
        "versions": {"python": platform.python_version(), "torch": torch.__version__} | versions(),
    }


def summary(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's line in the history: medians and quartiles, no samples."""
    found = {}
    for name, test in run["tests"].items():
        samples = merged(test)
        ends = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
        found[name] = [float(f"{value:.4g}") for value in (test["median_s"], ends[0], ends[2])]
    return {key: run[key] for key in ("date", "commit", "machine")} | {"median_and_quartiles_s": found}


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def table_of(changes: Sequence[Change]) -> Table:
    """A row a test, the slower ones first."""
    rows = []
    for change in sorted(changes, key=lambda change: ORDER.index(change.verdict)):
        times = [f"{1000 * s:.3g}" if s is not None else None for s in (change.before_s, change.after_s)]
        ratio = f"{change.ratio:.2f}" if change.ratio is not None else None
        ends = "{:.2f} to {:.2f}".format(*change.ci95) if change.ci95 else None
        noise = f"±{change.noise:.0%}" if change.noise is not None else None
        rows.append([change.name.removeprefix("benchmarks/"), *times, ratio, ends, noise, change.verdict])
    head = ["test", "baseline, ms", "now, ms", "ratio", "95%", "noise", "verdict"]
    return Table(title="Against the baseline", head=head, rows=rows)


def show(changes: Sequence[Change], baseline: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """The table, the slower ones first, and what it can be trusted for."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = table_of(changes)
    lines = Lines(title=table.title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(table.head):
        lines.add_column(name, justify="right" if 0 < i < 6 else "left")
    for *cells, verdict in table.rows:
        lines.add_row(*(Text(cell(value)) for value in cells), Text(verdict, style=COLOURS[verdict]))
    console.print(lines)
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ORDER}
    console.print(", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n), highlight=False)
    other = differences(baseline, run)
    if other:
        console.print(
            f"Not the baseline's conditions ({'; '.join(other)}): ratios are those of multiples of the same run's "
            "bare products, not of seconds.",
            highlight=False,
        )
    else:
        anchor = next((change for change in changes if change.name == ANCHOR), None)
        if anchor is not None and anchor.verdict in ("slower", "faster"):
            console.print(
                f"The bare products, which no code here is part of, are {anchor.verdict} as well: so is the machine.",
                highlight=False,
            )
    for name, version in run["machine"]["versions"].items():
        before = baseline["machine"].get("versions", {}).get(name)
        if before != version:
            console.print(f"{name} {version} here, {before} in the baseline", highlight=False)
    console.print(
        f"baseline {baseline.get('date')}, commit {str(baseline.get('commit'))[:12]}", highlight=False
    )


if __name__ == "__main__":
    run_command(main)
