"""A whole GRPO step against its peers on this machine, and where its time goes.

    python -m benchmarks.step --peer-python VENV/bin/python   # with TRL, from a Python of its own that has it
    python -m benchmarks.step --quick                         # everything once, very small
    python -m benchmarks.step --device cuda                   # Qwen2.5 0.5B, 1.5B and 7B in bf16, one JSON a case

On a CPU, in one run: a whole step against TRL's GRPOTrainer and a plain hand-written one; generation against
`generate` and continuous batching; time by phase; what shared prompts, packing and skipping save. Losses and gradients
are compared before anything is timed. Prints a table; samples go to JSON, which `python -m benchmarks.step.picture`
draws.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit, device_name, versions
from benchmarks.page import command_line, page_of
from benchmarks.step import cpu, timing
from grpo_fast.run.command import Parser, prepare_libraries, run_command
from grpo_fast.run.metrics import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 1 where a GPU case failed."""
    parser = Parser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--peer-python", help="a Python with trl installed; without it TRL is not measured")
    parser.add_argument("--repeats", type=int, default=9, help="CPU: rounds after the warm-up")
    parser.add_argument("--parts", nargs="+", choices=cpu.PARTS, default=[], help="CPU: only these")
    parser.add_argument("--quick", action="store_true", help="CPU: every part once, very small")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="CPU: wall seconds, or CPU seconds of the process (--threads 1), where others use the machine too",
    )
    parser.add_argument("--cases", nargs="+", default=[], help="GPU: only these")
    parser.add_argument("--seconds", type=float, default=480, help="GPU: the cases take no longer than this")
    parser.add_argument(
        "--output",
        type=Path,
        help="CPU: the JSON file (benchmarks/results/step-cpu.json for every part with a peer, else none); GPU: the "
        "folder of the JSON files",
    )
    args = parser.parse_args(argv)
    prepare_libraries(args.threads)
    on_gpu = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if on_gpu and not args.quick:
        from benchmarks.step import gpu

        return gpu.run_cases(
            args.output or Path("benchmarks/results"), args.cases, args.seconds, args.peer_python
        )
    if args.clock == "cpu":
        timing.clock = time.process_time
    # What is committed compares with the peer: a smaller run goes to a file where one is named, else to the screen.
    whole = args.peer_python and not args.quick and not args.parts
    output = args.output or (Path("benchmarks/results/step-cpu.json") if whole else None)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for measured in cpu.run(
            Path(folder),
            peer_python=args.peer_python,
            repeats=2 if args.quick else args.repeats,
            quick=args.quick,
            parts=tuple(args.parts),
        ):
            record = header("cpu") | {"clock": args.clock} | measured
            if output:
                write_atomically(output, json.dumps(record, indent=1) + "\n")
                page_of(output, command=command_line())
    print(table(record))
    return 0


def header(device: str) -> dict[str, Any]:
    """What a record is of."""
    import transformers

    return {
        "benchmark": "step",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, **versions()},
        "commit": commit(),
    }


def table(record: dict[str, Any]) -> str:
    """The record in lines."""
    lines = [f"{record['device']}, {record['threads']} threads, torch {record['versions']['torch']}"]
    for part, unit in (("step", "a step"), ("generation", "the completions of a step")):
        found = record.get(part, {"median_s": {}, "missing": {}})
        own = next(iter(found["median_s"].values()), None)
        for name, value in found["median_s"].items():
            lines.append(f"{part:12}{name:30}{1000 * value:>10.1f} ms {unit}, {value / own:.2f} of ours")
        lines += [f"{part:12}{name:30}{why}" for name, why in found["missing"].items()]
    if "phases" in record:
        shares = record["phases"]["median_s"]
        whole = sum(shares.values())
        lines += [
            f"{'phase':12}{name:30}{1000 * value:>10.1f} ms {value / whole:>6.1%}"
            for name, value in shares.items()
        ]
    for name, rows in record.get("prefix", {}).items():
        for row in rows:
            lines.append(
                f"{'prefix':12}{name + ', ' + str(row['prompt']) + '/' + str(row['completion']):30}"
                f"saved {row['saved']:.1%}, tokens say {row['predicted']:.1%}: {row['reached']:.1%} of it"
            )
    for model, row in record.get("packing", {}).items():
        for name, value in row["median_s"].items():
            lines.append(f"{'packing':12}{model + ', ' + name:42}{1000 * value:>10.1f} ms")
    if "skipping" in record:
        for name, value in record["skipping"]["median_s"].items():
            lines.append(f"{'skipping':12}{name + ' of the groups':30}{1000 * value:>10.1f} ms")
        lines.append(f"{'skipping':12}{'time saved a share skipped':30}{record['skipping']['slope']:>10.2f}")
    for name, bar in record["bars"].items():
        lines.append(
            f"{'bar':12}{name:50}{bar['reached']:.2f} of {bar['wanted']:g}{'' if bar['met'] else ', MISSED'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
