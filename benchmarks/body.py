"""The body of a model, packed forward and backward: as it is, under torch.compile, with Liger's kernels.

    python -m benchmarks.body                                 # miniature and a larger model on the CPU
    python -m benchmarks.body --device cuda --output benchmarks/results/body-gpu.json

Layers of Qwen2.5's shapes with random weights, as deep as the table says (a model's layers are all alike). A sample is
the time of three packed rows of different lengths, so that a contender that compiles for each length shows it. Each
contender lives in a process of its own; repeats are interleaved. What is absent or fails is listed as not measured.
Prints a table and, last, one line of JSON.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.machine import commit, device_name, versions
from benchmarks.page import command_line, page_of
from grpo_fast.attention.function import ATTENTION_NAME
from grpo_fast.models.compiled import CompiledLayers
from grpo_fast.models.liger import apply_liger
from grpo_fast.models.self_check import packed_hidden_states
from grpo_fast.packing import PackedBatch, pack
from grpo_fast.run.allocator import keep_freed_memory

SHAPES = {  # hidden size, MLP size, layers, heads, key heads
    "miniature": (128, 384, 3, 4, 4),
    "small": (512, 1536, 8, 8, 8),
    "0.5b": (896, 4864, 4, 14, 2),
    "1.5b": (1536, 8960, 4, 12, 2),
    "7b": (3584, 18944, 4, 28, 4),
}
USUAL = {"cpu": "miniature,small", "cuda": "0.5b,1.5b,7b"}
CONTENDERS = ("eager", "compiled", "liger")
PATIENCE_S = 300
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a contender's hidden states or gradients are not those of eager."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default=None, choices=tuple(LARGEST_DIFFERENCE), help="default by device")
    parser.add_argument("--shapes", default=None, help=f"of {', '.join(SHAPES)}; default by device")
    parser.add_argument("--tokens", type=int, default=0, help="of the longest row; default by device")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: processor time, on a machine that is busy",
    )
    parser.add_argument("--output", default=None, help="JSON file for the whole record, samples included")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.tokens = args.tokens or (8192 if args.device == "cuda" else 1024)
    names = (args.shapes or USUAL[args.device]).split(",")
    contenders = args.contenders.split(",")
    for known, asked in ((SHAPES, names), (CONTENDERS, contenders)):
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device found")
    record = {
        "benchmark": "body",
        "device": device_name(args.device),
        "dtype": args.dtype,
        "threads": args.threads,
        "clock": args.clock,
        "tokens": [len(batch.input_ids[0]) for batch in rows(args.tokens)],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }
        | versions(),
        "commit": commit(),
        "shapes": {name: measure(name, contenders, args) for name in names},
    }
    _print_table(record)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
        page_of(Path(args.output), command=command_line())
    ratios = {name: shape["eager_over"] for name, shape in record["shapes"].items()}
    print(json.dumps({"device": record["device"], "dtype": args.dtype, "eager_over": ratios}))
    agree = (row["agrees"] for shape in record["shapes"].values() for row in shape["contenders"].values())
    return 0 if all(value is not False for value in agree) else 1


def rows(tokens: int) -> list[PackedBatch]:
    """Three rows of about `tokens`, 4/5 and 2/3 of it: groups of eight completions that share their prompt."""
    found = []
    for share in (1.0, 0.8, 0.67):
        draw, prompts, completions, owner, left = random.Random(tokens), [], [], [], int(tokens * share)
        longest = min(max(left // 12, 8), 256)
        while left > 0:
            prompts.append([draw.randrange(1024) for _ in range(longest // 2)])
            group = [draw.randint(longest // 4, longest) for _ in range(8)]
            completions += [[draw.randrange(1024) for _ in range(length)] for length in group]
            owner += [len(prompts) - 1] * 8
            left -= len(prompts[-1]) + sum(group)
        found += pack(prompts, completions, prompt_of=owner, token_budget=1 << 30)
    return found


def measure(shape: str, contenders: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """All contenders at one shape, interleaved."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    links: dict[str, Connection] = {}
    processes = []
    for name in contenders:  # one after another, so that one's compilation does not slow another's
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(name, shape, vars(args), there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        results[name] = {"error": None, "agrees": None, "samples_s": []} | _answer(here)
        links[name] = here
    for _ in range(args.repeats):
        for name, link in links.items():
            if results[name]["error"] is None:
                link.send("go")
                answer = _answer(link)
                results[name]["error"] = answer.get("error")
                results[name]["samples_s"] += answer.get("samples_s", [])
    for name, link in links.items():
        if results[name]["error"] is None:
            link.send("stop")
            results[name] |= _answer(link)
    for process in processes:
        process.join(10)
        process.kill()  # nothing to one that has ended
    eager = results.get("eager", {}).get("fingerprint")
    for row in results.values():
        mine = row.pop("fingerprint", None)
        if eager and mine:
            row["difference"] = float(
                (torch.tensor(mine) - torch.tensor(eager)).norm() / torch.tensor(eager).norm()
            )
            row["agrees"] = row["difference"] <= LARGEST_DIFFERENCE[args.dtype]
    median = {name: statistics.median(row["samples_s"]) for name, row in results.items() if row["samples_s"]}
    return {
        "sizes": dict(zip(("hidden", "mlp", "layers", "heads", "key_heads"), SHAPES[shape], strict=True)),
        "median_s": median,
        "eager_over": {
            n: median["eager"] / s for n, s in median.items() if "eager" in median and n != "eager"
        },
        "contenders": results,
    }


def _answer(link: Connection) -> dict[str, Any]:
    """What a contender says; one that compiles for longer than this is not waited for."""
    try:
        return link.recv() if link.poll(PATIENCE_S) else {"error": f"no answer in {PATIENCE_S} s"}
    except (EOFError, OSError):
        return {"error": "its process ended"}


def _worker(name: str, shape: str, spec: dict[str, Any], link: Connection) -> None:
    """Build one contender, say what it computes, then time the rows for every "go"."""
    torch.set_num_threads(spec["threads"])
    keep_freed_memory()
    device = spec["device"]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # compilation is timed as a first run has it
        try:
            model = _model(shape, getattr(torch, spec["dtype"]), device)
            batches = [batch.to(device) for batch in rows(spec["tokens"])]
            layers = None
            if name == "compiled":
                layers = CompiledLayers()
                layers.install(model)
            elif name == "liger":
                if device == "cpu":
                    raise RuntimeError("Liger's kernels need a CUDA device")
                apply_liger(model)
            start = time.perf_counter()
            _seconds(model, batches, layers, spec)
            first = time.perf_counter() - start
            link.send({"first_s": first, "fingerprint": _fingerprint(model, batches[0], layers)})
            while link.recv() == "go":
                link.send({"samples_s": [_seconds(model, batches, layers, spec)]})
            memory = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {}
            link.send(memory | (layers.metrics() if layers else {}))
        except Exception as error:  # a contender that is absent or cannot run this is reported, not hidden
            link.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def _model(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    hidden, mlp, layers, heads, key_heads = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = cast(Any, Qwen2ForCausalLM(config)).to(device, dtype)
    model.set_attn_implementation(ATTENTION_NAME)
    return model.train()


def _seconds(
    model: PreTrainedModel, batches: list[PackedBatch], layers: CompiledLayers | None, spec: dict[str, Any]
) -> float:
    """Time of a forward and a backward pass of every row."""
    clock = time.process_time if spec["clock"] == "cpu" else time.perf_counter
    if spec["device"] == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for batch in batches:
        _loss(packed_hidden_states(model, batch, layers)).backward()
        model.zero_grad()
    if spec["device"] == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _loss(hidden: torch.Tensor) -> torch.Tensor:
    """A number whose gradient is not near zero: the last norm fixes the squares' sum, not a direction's share."""
    return (hidden.float() @ torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)).mean()


def _fingerprint(model: PreTrainedModel, batch: PackedBatch, layers: CompiledLayers | None) -> list[float]:
    """Some hidden states and the gradients of the first layer's norm, each scaled to length 1."""
    hidden = packed_hidden_states(model, batch, layers)
    norm = next(weight for path, weight in model.named_parameters() if "layernorm" in path)
    (grad,) = torch.autograd.grad(_loss(hidden), [norm])
    parts = [x.detach().float().flatten() for x in (hidden[-4:], grad)]
    return torch.cat([x / x.norm() for x in parts]).tolist()


def _print_table(record: dict[str, Any]) -> None:
    print(f"body, forward and backward, {record['dtype']}, {record['device']}, {record['threads']} threads")
    print(f"rows of {', '.join(map(str, record['tokens']))} tokens")
    print(
        f"{'shape':11}{'contender':11}{'median':>10}{'best':>10}{'eager/it':>10}{'first':>9}  difference, graphs"
    )
    for shape, found in record["shapes"].items():
        for name, row in found["contenders"].items():
            if not row["samples_s"]:
                print(f"{shape:11}{name:11} not measured: {row['error']}")
                continue
            ratio = found["eager_over"].get(name)
            graphs = (
                f", {row['compile/graphs']:.0f} in {row['time/compile_s']:.0f} s"
                if name == "compiled"
                else ""
            )
            print(
                f"{shape:11}{name:11}{found['median_s'][name]:>9.4f}s{min(row['samples_s']):>9.4f}s"
                f"{f'{ratio:.2f}' if ratio else '':>10}{row['first_s']:>8.1f}s  {row.get('difference', 0):.0e}{graphs}"
            )


if __name__ == "__main__":
    sys.exit(main())
