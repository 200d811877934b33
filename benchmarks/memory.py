"""The planner against what real steps take: one process a configuration, one at a time.

    python -m benchmarks.memory --output benchmarks/results/memory-cpu.json
    python -m benchmarks.memory --device cuda --output benchmarks/results/memory-cuda.json

Each process builds a policy and a reward model with random weights, and takes two steps of the real code: a rollout
with the built-in engine, its scoring, an update. Then its peak is read: of the CPU the resident memory, runtime
included, of a GPU what PyTorch handed out and what it reserved. Prints a row a configuration, and draws the picture
beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit, device_name
from benchmarks.memory_cases import CASES, Case, built, planned
from benchmarks.page import command_line, page_of
from grpo_fast.engines.base import Sampling
from grpo_fast.grpo import update
from grpo_fast.memory.device import available_bytes
from grpo_fast.rollout import Rollout
from grpo_fast.scoring import Scored

BAR = 0.15


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a configuration is outside ±15% or could not be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="+", help="names; default: every one of the device")
    parser.add_argument("--output", help="JSON file; the picture gets its name")
    parser.add_argument("--again", action="store_true", help="plan anew what --output has measured already")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not args.again and not torch.cuda.is_available():
        print("benchmarks.memory: no CUDA device found", file=sys.stderr)
        return 2
    cases = {
        name: case
        for name, case in CASES.items()
        if (name in args.cases if args.cases else case.device == args.device)
    }
    known = json.loads(Path(args.output).read_text()) if args.again else {}
    record = {
        "benchmark": "memory",
        "device": known.get("device") or device_name(args.device),
        "versions": known.get("versions") or versions(),
        "commit": known.get("commit") or commit(),
        "bar": BAR,
        "cases": known.get("cases", []),
    }
    for name, case in {} if args.again else cases.items():
        if case.device == "cuda" and planned(case).peak > available_bytes(torch.device("cuda")):
            print(f"{name:28} left out: it needs more than this GPU has", flush=True)
            continue
        record["cases"].append({"name": name, "settings": case.described(), **measured_alone(case)})
        print(f"{name:28} {record['cases'][-1]['error'] or 'measured'}", flush=True)
        if args.output:  # after each, so that what was measured is kept whatever comes
            write(record, Path(args.output))
    record["planned_at"] = commit()
    for row in record["cases"]:
        row |= prediction(CASES[row["name"]], row["peak"])
        print(line(row), flush=True)
    rows = record["cases"]
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    inside = sum(abs(ratio - 1) <= BAR for ratio in ratios)
    if ratios:
        span = f"predicted / measured {min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{inside} of {len(rows)} within ±{BAR:.0%}; {span}")
    if args.output:
        write(record, Path(args.output))
        draw(record, Path(args.output).with_suffix(".png"))
        page_of(Path(args.output), command=command_line())
    return 0 if inside == len(rows) else 1


def write(record: dict[str, Any], path: Path) -> None:
    """The record as it is by now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Python and the libraries that hold the memory."""
    from importlib.metadata import version

    return {"python": platform.python_version()} | {n: version(n) for n in ("torch", "transformers", "peft")}


def measured_alone(case: Case) -> dict[str, Any]:
    """`measure` in a process of its own, started anew: a fork would not have the libraries' pages as its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(case, there))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = {"error": "its process ended", "phases": {}, "peak": None, "reserved": None}
    process.join()
    return found


def _send(case: Case, link: Connection) -> None:
    try:
        link.send({"error": None, **measure(case)})
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        link.send({"error": what, "phases": {}, "peak": None, "reserved": None})


def prediction(case: Case, peak: int | None) -> dict[str, Any]:
    """What the planner says of a case whose measured peak is known."""
    started = time.perf_counter()
    estimate = planned(case)
    return {
        "predicted": estimate.parts() | estimate.phases() | {"peak": estimate.peak},
        "planning_s": time.perf_counter() - started,
        "ratio": estimate.peak / peak if peak else None,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["error"]:
        return f"{row['name']:28} {row['error']}"
    gib = 2**30
    phases = " ".join(f"{name} {size / gib:.2f}" for name, size in row["phases"].items())
    return (
        f"{row['name']:28} predicted {row['predicted']['peak'] / gib:6.2f}  measured {row['peak'] / gib:6.2f} GiB  "
        f"ratio {row['ratio']:.3f}   ({phases})"
    )


def measure(case: Case) -> dict[str, Any]:
    """Two real steps, a short one that gives the optimizer its state and a full one.

    Peaks in bytes after each phase; they only rise.
    """
    run = built(case)
    phases, generator = {"load": peak_bytes(case)}, torch.Generator().manual_seed(0)
    for count, new in ((1, 2), (case.prompts, case.new)):
        sequences = count * case.group
        prompts = [torch.randint(256, (case.prompt,), generator=generator).tolist() for _ in range(count)]
        completions = run.engine.generate(prompts, case.group, Sampling(max_new_tokens=new), count)
        phases["generate"] = peak_bytes(case)
        if run.reward is not None:
            asked = [f"{i // case.group:03d}" + "x" * (case.prompt - 3) for i in range(sequences)]
            run.reward.predict(run.reward.encode(asked, ["y" * (new - 1)] * sequences), case.reward_tokens)
            phases["score"] = peak_bytes(case)
        nothing = torch.zeros(sequences, 1)
        rollout = Rollout(
            prompts=[replace(run.prompt, token_ids=ids) for ids in prompts],
            prompt_of=[i // case.group for i in range(sequences)],
            completions=completions,
            texts=[""] * sequences,
            scored=Scored(rewards=nothing, spread=nothing),
            advantages=torch.randn(sequences, generator=generator),
        )
        update(run.policy, run.optimizer, rollout, run.config, lr=1e-5, reference=run.reference)
        phases["update"] = peak_bytes(case)
    reserved = torch.cuda.max_memory_reserved() if case.device == "cuda" else None
    return {"phases": phases, "peak": max(phases.values()), "reserved": reserved}


def peak_bytes(case: Case) -> int:
    """The process's most resident memory so far, or the most PyTorch had handed out on the GPU."""
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw(record: dict[str, Any], path: Path) -> None:
    """Predicted against measured, the bar as a band."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $
    import matplotlib.pyplot as plt

    rows = [row for row in record["cases"] if row["ratio"]]
    if not rows:
        return
    gib = 2**30
    figure, axis = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    measured = [row["peak"] / gib for row in rows]
    ends = [0.8 * min(measured), 1.2 * max(measured)]
    axis.fill_between(ends, [0.85 * x for x in ends], [1.15 * x for x in ends], color="#dfeaf0", label="±15%")
    axis.plot(ends, ends, color="grey", linewidth=0.8)
    kinds = {"full": "#1f6f8b", "LoRA": "#e09f3e"}
    for kind, colour in kinds.items():
        for checkpointing, marker in ((False, "o"), (True, "^")):
            chosen = [
                row
                for row in rows
                if (kind == "LoRA") == bool(row["settings"]["lora_rank"])
                and row["settings"]["checkpointing"] == checkpointing
            ]
            axis.plot(
                [row["peak"] / gib for row in chosen],
                [row["predicted"]["peak"] / gib for row in chosen],
                marker,
                color=colour,
                label=kind + (", checkpointing" if checkpointing else ""),
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("{x:g}")
    axis.set_xlabel("measured peak, GiB")
    axis.set_ylabel("predicted before loading, GiB")
    axis.set_title(f"Memory of a run · {record['device']}", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
