"""Qwen2.5's architectures with random weights in bf16 on a GPU: the update, generation and whole steps.

    python -m benchmarks.step --device cuda

Every case runs in a process of its own and writes a JSON file of its own; one that fails, runs out of memory or takes
too long is reported and the others go on. FLOPs are the model's: 6 a weight and position (4 where the weight is frozen)
for the body, the same for completion tokens at the head, and 12 a visible pair of positions and channel for attention;
what is computed twice (checkpointing) counts once, and a shared prompt counts once.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.page import page_of
from benchmarks.step.contenders import Generate, OurStep, Peer, batching, engine_of, random_rollout
from benchmarks.step.cpu import peer_spec, phases
from benchmarks.step.timing import medians, take_turns
from benchmarks.step.work import QWEN, Shape, Size, config_of, model_of, prompts_of, tokenizer_of
from grpo_fast.attention.function import ATTENTION_NAME
from grpo_fast.engines.base import Sampling
from grpo_fast.grpo import packed, update
from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.policy import Policy
from grpo_fast.packing import PackedBatch
from grpo_fast.run.metrics import write_atomically

CASE_SECONDS = 170
DENSE_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}
"""Data sheets' dense bf16 rates by a part of the device's name, the first that fits."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and what is measured of it."""

    shape: Shape
    size: Size
    parts: tuple[str, ...] = ("generation", "update", "step")
    lora_rank: int = 0
    optimizer: str = "adamw"
    checkpointing: bool = False
    repeats: int = 2
    peer_rows: int = 0
    """Sequences of one of TRL's micro-batches; 0: TRL is not run"""


SHORT = Size(prompt_tokens=512, new_tokens=256, token_budget=20480)
CASES = {
    "0.5b": Case(shape=QWEN["0.5b"], size=SHORT, peer_rows=16),
    "1.5b": Case(shape=QWEN["1.5b"], size=replace(SHORT, token_budget=10240), peer_rows=8),
    "7b-lora": Case(shape=QWEN["7b"], size=replace(SHORT, token_budget=5120), lora_rank=16),
    # prime-rl publishes 12.5 GiB for Qwen3 0.6B, full fine-tuning, one sequence of 16k tokens at a time, on an H100
    "0.5b-16k": Case(
        shape=QWEN["0.5b"],
        size=Size(prompts=1, group=2, prompt_tokens=384, new_tokens=16000, token_budget=16384),
        parts=("update",),
        checkpointing=True,
    ),
    "7b-lora-16k": Case(
        shape=QWEN["7b"],
        size=Size(prompts=1, prompt_tokens=4096, new_tokens=12288, token_budget=53248),
        parts=("update",),
        lora_rank=16,
        checkpointing=True,
        repeats=1,
    ),
    "7b-full": Case(
        shape=QWEN["7b"],
        size=Size(prompts=4, prompt_tokens=512, new_tokens=512, token_budget=8192),
        parts=("update",),
        checkpointing=True,
    ),
    "7b-full-adafactor": Case(
        shape=QWEN["7b"],
        size=Size(prompts=4, prompt_tokens=512, new_tokens=512, token_budget=8192),
        parts=("update",),
        optimizer="adafactor",
        checkpointing=True,
    ),
}


def run_cases(folder: Path, names: Sequence[str], seconds: float, peer_python: str | None = None) -> int:
    """Every case (or those named) one after another; exit code 1 where one failed, 2 without a GPU.

    All of them together take `seconds` at most: what has not begun by then is left out, and said so.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown or not torch.cuda.is_available():
        print(
            f"unknown case {unknown[0]!r}: {', '.join(CASES)}" if unknown else "no CUDA device",
            file=sys.stderr,
        )
        return 2
    if peer_python is None and importlib.util.find_spec("trl") is not None:
        peer_python = sys.executable
    folder.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), []
    for name in names or CASES:
        path = folder / f"step-{name}.json"
        spent = time.monotonic() - started
        if spent >= seconds:
            print(f"step {name:20} not run: {spent:.0f} s are spent", flush=True)
            failed.append(name)
            continue
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.step.gpu", name, str(path), peer_python or ""]
        limit = min(CASE_SECONDS, seconds - spent)
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
            error = f"its process ended with code {code}"
        except subprocess.TimeoutExpired:
            code, error = 1, f"took longer than {limit:.0f} s"
        if code:
            record = json.loads(path.read_text()) if path.exists() else {"benchmark": "step", "case": name}
            write_atomically(path, json.dumps({"error": error} | record, indent=1) + "\n")
        page_of(path)
        if code:
            failed.append(name)
        print(
            f"step {name:20} {time.monotonic() - started:6.0f} s  {'failed' if code else 'done'}", flush=True
        )
    return 1 if failed else 0


def main(name: str, path: Path, peer_python: str) -> int:
    """One case, in this process. What was measured before it failed is kept."""
    from benchmarks.step.__main__ import header
    from grpo_fast.run.command import prepare_libraries

    prepare_libraries(0)
    rates = peak_rates()
    record = header("cuda") | {"case": name, "peak_flops": rates}
    case, code = CASES[name], 0
    try:
        for part, found in measure(case, "cuda", peer_python, rates):
            record[part] = found
            write_atomically(path, json.dumps(record, indent=1) + "\n")
            print(f"  {name} {part}: {json.dumps(brief(found))}", flush=True)
    except Exception as error:  # the other cases go on
        full = isinstance(error, torch.OutOfMemoryError)
        record["error"] = "out of memory" if full else f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"  {name}: {record['error']}", flush=True)
        code = 1
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return code


def brief(found: dict[str, Any]) -> dict[str, Any]:
    """A part without its samples."""
    return {key: value for key, value in found.items() if not key.endswith("samples_s") and key != "rounds_s"}


def measure(
    case: Case, device: str, peer_python: str, rates: Mapping[str, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (part, what was found) in turn; `rates` are the FLOP/s that count as all. Raises whatever goes wrong."""
    needed = held_bytes(case)
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    yield "memory", {"weights_gradients_states_gib": needed / 2**30}
    if total is not None and needed > 0.97 * total:
        raise ValueError(
            f"does not fit: {needed / 2**30:.0f} GiB before activations, the device has {total / 2**30:.0f}"
        )
    tokenizer = tokenizer_of(case.shape.vocabulary)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model_of(case.shape, tokenizer, dtype=dtype, device=device)
    folder = tempfile.TemporaryDirectory() if peer_python and case.peer_rows else None
    if folder:
        model.save_pretrained(folder.name)
        tokenizer.save_pretrained(folder.name)
    if "generation" in case.parts:
        yield "generation", generation(model, case, device)
    lora = LoraSettings(rank=case.lora_rank) if case.lora_rank else None
    policy = Policy.from_model(model, tokenizer, lora=lora, gradient_checkpointing=case.checkpointing)
    config = config_of(
        case.size,
        device=device,
        lora_rank=case.lora_rank,
        optimizer=case.optimizer,
        checkpointing=case.checkpointing,
    )
    step = OurStep(policy, case.size, config)
    if "update" in case.parts:
        yield "update", training(step, case, rates)
    if "step" in case.parts:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = phases(step, repeats=case.repeats)
        yield "step", found | {"peak_gib": peak_gib(device)}
    if folder:
        del step, policy, model
        gc.collect()
        torch.cuda.empty_cache()
        yield "trl", trl(folder.name, case, device, peer_python)
        folder.cleanup()
    elif case.peer_rows:
        yield "trl", {"missing": "not measured: trl is not installed here"}


def held_bytes(case: Case) -> int:
    """Weights, and of the trained ones float32 masters, float32 gradients and the optimizer's state."""
    weights = (
        body_weights(case.shape) + (1 if case.shape.tied else 2) * case.shape.vocabulary * case.shape.hidden
    )
    trained = 0 if case.lora_rank else weights
    return 2 * weights + trained * (16 if case.optimizer == "adamw" else 8)


def body_weights(shape: Shape) -> int:
    """Weights in the matrix products of all layers."""
    return shape.layers * shape.layer_weights


def generation(model: PreTrainedModel, case: Case, device: str) -> dict[str, Any]:
    """The engine and `generate` on the same weights, S sequences, 128 new tokens each."""
    size = replace(case.size, new_tokens=min(128, case.size.new_tokens))
    config = config_of(size, device=device)
    tokenizer = tokenizer_of(case.shape.vocabulary)
    prompts = [prompt.token_ids for prompt in prompts_of(tokenizer, size.prompts, size.prompt_tokens)]
    prompt_ids = torch.tensor(prompts, device=device)
    engine = engine_of(Policy.from_model(model, tokenizer), config)
    sampling = Sampling(max_new_tokens=size.new_tokens)
    plain = Generate(model, size)

    def by_transformers() -> None:
        model.set_attn_implementation("sdpa")
        try:
            assert plain(prompt_ids).shape[0] == size.prompts * size.group
        finally:
            model.set_attn_implementation(ATTENTION_NAME)

    contenders: dict[str, Callable[[], Any]] = {
        "engine": lambda: len(engine.generate(prompts, size.group, sampling, 0)),
        "generate": by_transformers,
    }
    samples = take_turns(contenders, repeats=case.repeats, device=device)
    median = medians(samples)
    tokens = size.prompts * size.group * size.new_tokens
    return {
        "samples_s": samples,
        "tokens_per_s": {name: tokens / value for name, value in median.items()},
        "speedup": median["generate"] / median["engine"],
    }


class _Update:
    """`update` alone on one random rollout, in the place of a step for `phases`."""

    def __init__(self, step: OurStep, size: Size) -> None:
        self.policy, self.optimizer, self.config = step.policy, step.optimizer, step.config
        self.rollout = random_rollout(step.task, size)

    def __call__(self, timer: Callable[[str], AbstractContextManager[None]] | None = None) -> None:
        update(self.policy, self.optimizer, self.rollout, self.config, lr=0.0)


def training(step: OurStep, case: Case, rates: Mapping[str, float]) -> dict[str, Any]:
    """Tokens a second, the share of the device's arithmetic that the model's own FLOPs make, peak memory, phases."""
    device = step.policy.device.type
    run = _Update(step, case.size)
    everything = list(range(len(run.rollout.completions)))
    batches = packed(run.rollout, everything, step.policy, case.size.token_budget)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = phases(run, repeats=case.repeats)
    flops = model_flops(case, batches)
    passes = found["unwatched_s"] - found["median_s"]["optimizer"]
    positions = sum(batch.plan.length for batch in batches)
    return found | {
        "positions": positions,
        "completion_tokens": sum(len(batch.targets) for batch in batches),
        "micro_batches": len(batches),
        "positions_per_s": positions / found["unwatched_s"],
        "model_flops": flops,
        "flops_per_s": flops / found["unwatched_s"],
        "mfu": {name: flops / found["unwatched_s"] / rate for name, rate in rates.items()},
        "mfu_without_optimizer": {name: flops / passes / rate for name, rate in rates.items()},
        "peak_gib": peak_gib(device),
    }


def model_flops(case: Case, batches: Sequence[PackedBatch]) -> float:
    """Of one forward and backward pass over the batches, nothing counted twice; LoRA's own few are left out."""
    shape, each = case.shape, 4 if case.lora_rank else 6
    positions = sum(batch.plan.length for batch in batches)
    tokens = sum(len(batch.targets) for batch in batches)
    pairs = sum(
        own * shared + own * (own + 1) // 2
        for batch in batches
        for own, shared in zip(batch.plan.q_lens, batch.plan.prefix_lens, strict=True)
    )
    products = each * (positions * body_weights(shape) + tokens * shape.vocabulary * shape.hidden)
    return float(products + 12 * pairs * shape.layers * shape.hidden)


def peak_rates() -> dict[str, float]:
    """FLOP/s: the data sheet's, where the device is known, and those of a large bf16 product here and now."""
    name = torch.cuda.get_device_name()
    known = next((rate for part, rate in DENSE_BF16.items() if part in name), None)
    width = 8192
    a, b = (torch.randn(width, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        torch.mm(a, b)
    end.record()
    torch.cuda.synchronize()
    measured = {"cublas": 20 * 2 * width**3 / (start.elapsed_time(end) / 1000)}
    return measured if known is None else {"data sheet": known} | measured


def peak_gib(device: str) -> float | None:
    """Highest allocation since it was last reset."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def trl(folder: str, case: Case, device: str, peer_python: str) -> dict[str, Any]:
    """TRL's whole step with `generate` and with continuous batching, after ours has left the device."""
    found: dict[str, Any] = {"samples_s": {}, "missing": {}}
    sequences = case.size.prompts * case.size.group
    common = peer_spec(Path(folder), case.size)
    common |= {"device": device, "dtype": "bfloat16", "micro_batch": case.peer_rows}
    for name, settings in (
        ("generate", {}),
        ("continuous batching", {"continuous_batching": batching(device, sequences)}),
    ):
        try:
            peer = Peer(peer_python, common | settings)
            peer.step()
            found["samples_s"][name] = [peer.step() for _ in range(case.repeats)]
            peer.close()
        except RuntimeError as error:
            found["missing"][name] = str(error)
    return found | {"median_s": medians(found["samples_s"])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
