"""The loss head, forward and backward: ours against the bare products, eager PyTorch and Liger, in one run.

    python -m benchmarks.loss_head                                       # the CPU bar
    python -m benchmarks.loss_head --device cuda --dtype bfloat16 --shape 8192,4096,151936

Each contender lives in a process of its own; repeats are interleaved, one contender at a time. Agreement with
float64 is checked before anything is timed. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Problem, Run, truth
from benchmarks.machine import commit, device_name, forget_peak, resident, versions
from benchmarks.page import command_line, page_of
from grpo_fast.run.allocator import keep_freed_memory

PRODUCTS = {"trained": 3, "frozen": 2, "forward": 1}
_LOST: dict[str, Any] = {"error": "its process ended", "errors": [], "agrees": None}
LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; exit code 1 where a contender of ours disagrees with float64."""
    args = _arguments(argv)
    spec = vars(args)
    results: dict[str, dict[str, Any]] = {}
    workers = {name: _start(name, spec) for name in args.contenders}
    for name, (_, link) in workers.items():
        results[name] = {"samples_s": [], "extra_bytes": []} | _answer(link)
    alive = [name for name in workers if results[name]["error"] is None]
    for repeat in range(args.warmup + args.repeats):
        for name in list(alive):
            sample = _ask(workers[name][1])
            if sample["error"] is not None:  # the others go on
                alive.remove(name)
                results[name] |= {"samples_s": [], "extra_bytes": [], "error": sample["error"]}
            elif repeat >= args.warmup:
                results[name]["samples_s"].append(sample["seconds"])
                results[name]["extra_bytes"].append(sample["extra"])
    for name, (process, link) in workers.items():
        if name in alive:
            link.send("stop")
        process.join()
    record = _record(args, results)
    _print_table(record)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
        page_of(Path(args.output), command=command_line())
    print(
        json.dumps(
            {key: record[key] for key in ("device", "shape", "mode", "median_s", "extra_mib", "ratios")}
        )
    )
    return 0 if all(row["agrees"] is not False for row in results.values()) else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=tuple(LARGEST_ERROR))
    parser.add_argument("--shape", default="1024,256,50000", help="tokens,hidden size,vocabulary")
    parser.add_argument("--sequences", type=int, default=8, help="equal parts of the tokens")
    parser.add_argument("--mode", default="trained", choices=tuple(PRODUCTS))
    parser.add_argument("--contenders", default=None, help="comma-separated; default by device")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--output", default=None, help="JSON file for the whole record, samples included")
    args = parser.parse_args(argv)
    args.shape = tuple(int(part) for part in args.shape.split(","))
    if len(args.shape) != 3 or args.shape[0] % args.sequences:
        parser.error("--shape must be three numbers, the tokens a multiple of --sequences")
    usual = "products,torch,eager,liger" if args.device == "cpu" else "products,triton,torch,eager,liger"
    args.contenders = (args.contenders or usual).split(",")
    unknown = [name for name in args.contenders if name not in CONTENDERS]
    if unknown:
        parser.error(f"unknown contender {unknown[0]!r}; known: {', '.join(CONTENDERS)}")
    return args


def _start(name: str, spec: dict[str, Any]) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_worker, args=(name, spec, there), daemon=True)
    process.start()
    there.close()  # the process has its own; with this one open its end would not be noticed
    return process, here


def _ask(link: Connection) -> dict[str, Any]:
    """One timed call."""
    try:
        link.send("go")
    except OSError:
        return _LOST
    return _answer(link)


def _answer(link: Connection) -> dict[str, Any]:
    """What a contender has to say; a process that the system ended says nothing."""
    try:
        return link.recv()
    except (EOFError, OSError):
        return _LOST


def _worker(name: str, spec: dict[str, Any], link: Connection) -> None:
    """One contender: checks agreement, then times one call for every "go"."""
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    device = spec["device"]
    tokens, width, vocabulary = spec["shape"]
    problem = Problem.random(
        tokens,
        width,
        vocabulary,
        sequences=spec["sequences"],
        dtype=getattr(torch, spec["dtype"]),
        device=device,
    )
    try:
        run = CONTENDERS[name](problem, spec["mode"])
        errors = _errors(run(), problem, spec["mode"])
        extra = _extra_bytes(run, device)
    except Exception as error:  # a contender that is absent or cannot run this is reported, not hidden
        link.send({"error": _reason(error), "errors": [], "agrees": None})
        return
    agrees = all(error <= LARGEST_ERROR[spec["dtype"]] for error in errors)
    link.send({"error": None, "errors": errors, "agrees": agrees if errors else None})
    keep_freed_memory()  # from here as in training: freed memory stays with the process
    while link.recv() == "go":
        try:
            link.send({"error": None, "seconds": _seconds(run, device), "extra": extra})
        except Exception as error:  # its memory goes back with the process
            link.send({"error": _reason(error)})
            return


def _reason(error: Exception) -> str:
    """One line. PyTorch has an exception for a full GPU, and an ordinary one for a full host."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return "out of memory" if full else f"{type(error).__name__}: {error}".splitlines()[0]


def _errors(found: tuple[torch.Tensor, ...], problem: Problem, mode: str) -> list[float]:
    """Largest deviation of loss, dX, dW from float64, relative to the largest value."""
    if not found:
        return []
    pairs = zip(found, truth(problem, mode), strict=True)
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]


def _extra_bytes(run: Run, device: str) -> int:
    """Peak of one call in bytes beyond what was held before it; gradients that are its results count."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = _held(device)
    found = run()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    del found
    return max(0, peak - before)


def _seconds(run: Run, device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _held(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


def _record(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    tokens, width, vocabulary = args.shape
    timed = {name: row for name, row in results.items() if row["samples_s"]}
    median = {name: statistics.median(row["samples_s"]) for name, row in timed.items()}
    extra = {name: statistics.median(row["extra_bytes"]) / 2**20 for name, row in timed.items()}
    best = {name: min(row["samples_s"]) for name, row in timed.items()}
    flops = 2 * PRODUCTS[args.mode] * tokens * width * vocabulary
    own = next((name for name in ("triton", "torch") if name in median), None)
    ratios = {}
    if own is not None:
        ratios = {f"{own}/{name}": median[own] / value for name, value in median.items() if name != own}
        if extra.get("eager"):
            ratios[f"{own}/eager extra memory"] = extra[own] / extra["eager"]
    return {
        "benchmark": "loss_head",
        "shape": list(args.shape),
        "mode": args.mode,
        "dtype": args.dtype,
        "device": device_name(args.device),
        "threads": args.threads or torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__} | versions(),
        "commit": commit(),
        "median_s": median,
        "best_s": best,
        "extra_mib": extra,
        "tflops": {name: flops / value / 1e12 for name, value in median.items()},
        "ratios": ratios,
        "contenders": results,
    }


def _print_table(record: dict[str, Any]) -> None:
    tokens, width, vocabulary = record["shape"]
    print(f"loss head, {record['mode']}, {record['dtype']}, {record['device']}")
    print(f"N {tokens}, H {width}, V {vocabulary}")
    print(f"{'':16}{'median':>10}{'best':>10}{'TFLOP/s':>10}{'extra MiB':>11}  largest error")
    for name, row in record["contenders"].items():
        if row["error"] is not None:
            print(f"{name:16}{'-':>10}  {row['error']}")
            continue
        figures = (
            f"{record['median_s'][name]:>9.4f}s{record['best_s'][name]:>9.4f}s{record['tflops'][name]:>10.3f}"
        )
        errors = " ".join(f"{error:.1e}" for error in row["errors"])
        print(f"{name:16}{figures}{record['extra_mib'][name]:>11.0f}  {errors}")
    for name, ratio in record["ratios"].items():
        print(f"{name}: {ratio:.3f}")


if __name__ == "__main__":
    sys.exit(main())
