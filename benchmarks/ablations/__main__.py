"""Which idea pays: one step, and the same step with one idea removed.

    python -m benchmarks.ablations --output benchmarks/results/ablations-cpu.json
    python -m benchmarks.ablations --quick                  # under a minute, very small

Every contender does the same work from the same weights and the same rollout (mixed lengths, a quarter of the groups
without signal). Gradients, scores and log-probs are compared first; then the contenders take turns, and each one's
memory is measured in a process of its own. Prints a table; samples go to JSON, a picture and a page beside it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Lines
from rich.text import Text

from benchmarks.ablations import memory
from benchmarks.ablations.contenders import CONTENDERS, compare
from benchmarks.ablations.ideas import STEP
from benchmarks.ablations.picture import draw
from benchmarks.ablations.record import ablations, quality, tables
from benchmarks.ablations.work import FULL, QUICK, Scale, World
from benchmarks.page import command_line, page_of
from benchmarks.step import timing
from benchmarks.step.__main__ import header
from benchmarks.step.passes import SAME
from benchmarks.tables import cell
from grpo_fast.errors import UserError
from grpo_fast.run.command import Parser, prepare_libraries, run_command
from grpo_fast.run.metrics import write_atomically

RESULTS = Path("benchmarks/results")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.ablations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a very small step, few rounds")
    parser.add_argument("--repeats", type=int, default=0, help="rounds after the warm-up (9; --quick: 3)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, on a machine that is busy",
    )
    parser.add_argument("--output", type=Path, help="JSON file; picture (.png) and page (.html) get its name")
    args = parser.parse_args(argv)
    if args.repeats < 0 or args.threads < 0:
        raise UserError("--repeats and --threads must not be negative")
    if args.output and args.output.suffix != ".json":
        raise UserError(f"--output must be a .json file, got {args.output}")
    prepare_libraries(args.threads)
    if args.clock == "cpu":
        timing.clock = time.process_time
    record = {"benchmark": "ablations"} | {
        key: value for key, value in header("cpu").items() if key != "benchmark"
    }
    record |= {
        "clock": args.clock,
        "quick": args.quick,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command_line(),
    }
    record |= measure(
        QUICK if args.quick else FULL,
        repeats=args.repeats or (3 if args.quick else 9),
        processes=1 if args.quick else 2,
    )
    record["quality"] = quality(RESULTS)
    show(record)
    if args.output:
        save(record, args.output)
    return 0


def measure(scale: Scale, *, repeats: int, processes: int) -> dict[str, Any]:
    """Agreement, times, memory. AssertionError where a contender's answer is another one."""
    world = World(scale)
    contenders = {name: build(world) for name, build in CONTENDERS.items()}
    print("the same answers?", file=sys.stderr, flush=True)
    errors = compare(contenders, SAME)
    samples = timing.take_turns({name: found.run for name, found in contenders.items()}, repeats=repeats)
    median = timing.medians(samples)
    counted = {name: found.counted for name, found in contenders.items()}
    made = world.made
    work = scale.described() | {
        "sequences": len(made.completions),
        "prompt_tokens_all": sum(map(len, made.prompts)),
        "completion_tokens_all": sum(map(len, made.completions)),
        "without_signal": len(made.completions) - len(made.kept),
    }
    del world, contenders
    held = memory.measure(list(CONTENDERS), scale, repeats=processes)
    found = {
        name: {
            "counted": counted[name],
            "error": errors[name],
            "samples_s": samples[name],
            "median_s": median[name],
            "memory": held[name],
        }
        for name in CONTENDERS
    }
    whole = sum(median[name] for name in STEP)
    return {
        "work": work,
        "agreement": {"limit": SAME, "largest": max(errors.values())},
        "whole_step": {"parts": list(STEP), "median_s": whole},
        "contenders": found,
        "ablations": ablations(found),
    }


def show(record: dict[str, Any]) -> None:
    """The tables on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(
        f"{record['device']}, {record['threads']} threads, whole step "
        f"{1000 * record['whole_step']['median_s']:.0f} ms, answers agree to {record['agreement']['largest']:.0e}",
        highlight=False,
    )
    for table in tables(record):
        lines = Lines(title=table.title, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(table.head):
            lines.add_column(name, justify="left" if i < 2 else "right")
        for row in table.rows:
            lines.add_row(*(Text(cell(value)) for value in row))
        console.print(lines)


def save(record: dict[str, Any], output: Path) -> None:
    """JSON, picture and page."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(record, indent=1) + "\n")
    draw(record, output.with_suffix(".png"))
    page_of(output)


if __name__ == "__main__":
    run_command(main)
