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
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.loss_head import commit, device_name
from benchmarks.memory_cases import CASES, Case, planned

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
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(CASES[args.one])))
        return 0
    import torch

    if args.device == "cuda" and not args.again and not torch.cuda.is_available():
        print("benchmarks.memory: no CUDA device found", file=sys.stderr)
        return 2
    cases = {
        name: case
        for name, case in CASES.items()
        if (name in args.cases if args.cases else case.device == args.device)
    }
    known = json.loads(Path(args.output).read_text()) if args.again else {}
    measured = {row["name"]: row for row in known.get("cases", ())}
    record = {
        "benchmark": "memory",
        "device": known.get("device") or device_name(args.device),
        "versions": known.get("versions") or versions(),
        "commit": known.get("commit") or commit(),
        "planned_at": commit(),
        "bar": BAR,
        "cases": [],
    }
    for name, case in cases.items():
        if not args.again or name in measured:
            record["cases"].append(row(name, case, measured.get(name)))
            print(line(record["cases"][-1]), flush=True)
            if args.output:  # after each, so that what was measured is kept whatever comes
                write(record, Path(args.output))
    rows = record["cases"]
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    inside = sum(abs(ratio - 1) <= BAR for ratio in ratios)
    if ratios:
        span = f"predicted / measured {min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{inside} of {len(rows)} within ±{BAR:.0%}; {span}")
    if args.output:
        draw(record, Path(args.output).with_suffix(".png"))
    return 0 if inside == len(rows) else 1


def write(record: dict[str, Any], path: Path) -> None:
    """The record as it is by now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Python and the libraries that hold the memory."""
    from importlib.metadata import version

    return {"python": platform.python_version()} | {n: version(n) for n in ("torch", "transformers", "peft")}


def row(name: str, case: Case, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """What was predicted for a case and what its own process measured, now or before."""
    started = time.perf_counter()
    estimate = planned(case)
    seconds = time.perf_counter() - started
    if known is not None:
        ratio = estimate.peak / known["peak"] if known.get("peak") else None
        predicted = estimate.parts() | estimate.phases() | {"peak": estimate.peak}
        return known | {"predicted": predicted, "ratio": ratio}
    command = [sys.executable, "-m", "benchmarks.memory", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"error": None, "ratio": None}
    if done.returncode:
        found["error"] = (done.stderr.strip().splitlines() or ["killed"])[-1]
    else:
        found |= json.loads(done.stdout.strip().splitlines()[-1])
        found["ratio"] = estimate.peak / found["peak"]
    return {
        "name": name,
        "settings": case.described(),
        "predicted": estimate.parts() | estimate.phases() | {"peak": estimate.peak},
        "planning_s": seconds,
        **found,
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
    """Two real steps; peaks in bytes after each phase (the CPU's high-water mark only rises)."""
    import torch

    from benchmarks.memory_cases import built
    from grpo_fast.engines.base import Sampling
    from grpo_fast.grpo import update
    from grpo_fast.rollout import Rollout
    from grpo_fast.scoring import Scored

    run = built(case)
    config, phases, generator = run.config, {}, torch.Generator().manual_seed(0)
    sampling = Sampling(max_new_tokens=case.new)
    prompts = [torch.randint(256, (case.prompt,), generator=generator).tolist() for _ in range(case.prompts)]
    count = case.prompts * case.group
    phases["load"] = peak_bytes(case)
    for step in range(2):
        completions = run.engine.generate(prompts, case.group, sampling, step)
        phases["generate"] = peak_bytes(case)
        if run.reward is not None:
            asked = [
                f"{i:03d}" + "x" * (case.prompt - 3) for i in range(case.prompts) for _ in range(case.group)
            ]
            texts = ["y" * (case.new - 1)] * count
            run.reward.predict(run.reward.encode(asked, texts), case.reward_tokens)
            phases["score"] = peak_bytes(case)
        nothing = torch.zeros(count, 1)
        rollout = Rollout(
            prompts=[replace(run.prompt, token_ids=ids) for ids in prompts],
            prompt_of=[i // case.group for i in range(count)],
            completions=completions,
            texts=[""] * count,
            scored=Scored(rewards=nothing, spread=nothing),
            advantages=torch.randn(count, generator=generator),
        )
        update(run.policy, run.optimizer, rollout, config, lr=1e-5, reference=run.reference)
        phases["update"] = peak_bytes(case)
    reserved = torch.cuda.max_memory_reserved() if case.device == "cuda" else None
    return {"phases": phases, "peak": max(phases.values()), "reserved": reserved}


def peak_bytes(case: Case) -> int:
    """The process's most resident memory so far, or the most PyTorch had handed out on the GPU."""
    import resource

    import torch

    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw(record: dict[str, Any], path: Path) -> None:
    """Predicted against measured, the bar as a band."""
    import matplotlib

    matplotlib.use("Agg")
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
    axis.set_xlabel("measured peak, GiB")
    axis.set_ylabel("predicted before loading, GiB")
    axis.set_title(f"Memory of a run · {record['device']}", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
