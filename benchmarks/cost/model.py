"""What a step of GRPO, PPO and DPO would cost: FLOPs, memory and seconds for any decoder, on any machine with rates.

    python -m benchmarks.cost.model --output benchmarks/results/cost-sizes.json   # Qwen2.5 0.5B, 7B, 14B on 8 x H200
    python -m benchmarks.cost.model --model path/to/folder --gpus 4 --lora-rank 16
    OMP_NUM_THREADS=1 python -m benchmarks.cost.model --measure benchmarks/results/rates-cpu.json
    OMP_NUM_THREADS=1 python -m benchmarks.cost.model --check --rates benchmarks/results/rates-cpu.json \\
        --output benchmarks/results/cost-model-cpu.json

The rates of an H200 are published peaks times assumed shares, not measurements. Several GPUs each take a share of the
prompts; gradients are summed over the links after every optimizer step. Where a GPU's memory does not hold everything,
optimizer and gradients are shared out, then reference, reward and value model too, whose weights are then gathered for
every micro-batch; the policy's stay whole, for every GPU generates with them. None of that overlaps with the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from benchmarks.cost.architecture import Architecture
from benchmarks.cost.job import ALGORITHMS, Job, Load, Sizes, Step
from benchmarks.cost.memory import Memory, memory
from benchmarks.cost.rates import H200, STATE_TRAFFIC, Rates, measure_rates
from benchmarks.machine import commit
from benchmarks.step.work import QWEN
from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.memory.choose import GIB
from grpo_fast.models import pretrained
from grpo_fast.models.lora import LoraSettings
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import write_atomically


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One step of one algorithm."""

    algorithm: str
    flops: dict[str, float]
    """By phase, of all devices"""
    seconds: dict[str, float]
    """By phase; `communication` is the gradients' way between devices"""
    memory: Memory
    """Of one device"""
    checkpointing: bool
    """Whether layers are computed again in the backward pass to save memory"""
    fits: bool
    """Whether the device has that much"""

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())


def cost(
    algorithm: str, job: Job, rates: Rates, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Cost:
    """FLOPs, memory and seconds of one step of `algorithm` (a key of `ALGORITHMS`).

    Of what must be shared out and of checkpointing no more is taken than makes it fit the device.
    """
    one = job.on_one()
    needed = _fitting(algorithm, one, rates, job.gpus, device, dtype)
    one = replace(one, checkpointing=needed.checkpointing)
    found = needed.memory
    step = ALGORITHMS[algorithm](one, found.counts.trained, found.value_parameters)
    sizes, item = Sizes.of(one), dtype.itemsize
    weights = item * (sizes.policy.forward + sizes.policy.vocabulary * sizes.policy.hidden)
    seconds = {
        phase: load_seconds(
            load,
            rates,
            width=(sizes.reward if phase == "reward" else sizes.policy).hidden,
            weights=weights,
            item=item,
        )
        for phase, load in step.items()
    }
    if job.gpus > 1:
        away = (job.gpus - 1) / job.gpus
        moved = 2 * 4 * step["update"].updated + _gathered(step, found, job.gpus, _layers(sizes.policy))
        seconds["communication"] = away * moved / rates.link
    flops = {phase: job.prompts / one.prompts * load.total for phase, load in step.items()}
    return replace(needed, flops=flops, seconds=seconds)


def load_seconds(load: Load, rates: Rates, *, width: int, weights: int, item: int) -> float:
    """Seconds of a phase: products at the rates of their kind; decoding by arithmetic or by bytes, whichever is longer.

    A decoding step reads the `weights` (bytes) once and the cache, `item` bytes a number.
    """
    total = load.layers * rates.layer_s + load.steps * rates.step_s + load.logits * rates.draw_s
    total += load.updated * STATE_TRAFFIC / rates.optimizer
    total += sum(work / rates.of(kind, width) for kind, work in load.flops.items() if kind != "decode")
    moved = load.steps * (weights + item * load.cached)
    return total + max(load.flops.get("decode", 0.0) / rates.of("decode", width), moved / rates.bandwidth)


def _gathered(step: Step, found: Memory, gpus: int, layers: int) -> float:
    """Bytes of weights that come from the other devices, where models are shared out: once a pass and micro-batch.

    Of the update only the value network's, once forward and once backward.
    """
    if found.shards != "models":
        return 0.0
    models = {
        "reference": "reference",
        "reward": "reward_model",
        "values": "value_model",
        "update": "value_model",
    }
    passes = {phase: load.layers / layers / (3 if phase == "update" else 1) for phase, load in step.items()}
    return sum(
        passes[phase] * gpus * found.parts[model] for phase, model in models.items() if phase in passes
    )


def _layers(size: Architecture) -> int:
    return sum(layers.count for layers in size.attention)


def _fitting(algorithm: str, one: Job, rates: Rates, gpus: int, device: str, dtype: torch.dtype) -> Cost:
    """The first way to fit the device, from the fastest on; else the smallest. Its FLOPs and seconds are empty."""
    tried: list[Cost] = []
    plain: dict[bool, Memory] = {}
    # sharing out the optimizer costs nothing, checkpointing arithmetic, sharing out models their way
    ways = [
        ("nothing", False),
        ("optimizer", False),
        ("optimizer", True),
        ("models", False),
        ("models", True),
    ]
    if gpus == 1:
        ways = [("nothing", False), ("nothing", True)]
    for shards, asked in ways:
        checkpointing = asked or one.checkpointing
        if checkpointing not in plain:
            again = replace(one, checkpointing=checkpointing)
            plain[checkpointing] = memory(algorithm, again, device=device, dtype=dtype)
        found = plain[checkpointing].shared_out(shards, gpus)
        fits = found.peak <= rates.memory
        tried.append(
            Cost(
                algorithm=algorithm,
                flops={},
                seconds={},
                memory=found,
                checkpointing=checkpointing,
                fits=fits,
            )
        )
        if fits:
            return tried[-1]
    return min(tried, key=lambda each: each.memory.peak)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m benchmarks.cost.model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["0.5b", "7b", "14b"], help="Qwen2.5 models")
    parser.add_argument("--model", help="folder of a model, or of its config.json, in the place of --size")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=128, help="of a step, all GPUs together")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=512, help="length of the completions")
    parser.add_argument(
        "--reward-size", choices=list(QWEN), help="of the reward model; default: the policy's"
    )
    parser.add_argument("--no-kl", action="store_true", help="GRPO without a reference")
    parser.add_argument("--updates", type=int, default=1, help="passes of GRPO over a batch")
    parser.add_argument("--epochs", type=int, default=2, help="passes of PPO over a batch")
    parser.add_argument("--minibatches", type=int, default=2, help="optimizer steps of PPO in a pass")
    parser.add_argument("--lora-rank", type=int, default=0, help="0: all parameters are trained")
    parser.add_argument("--token-budget", type=int, default=16384, help="positions of a micro-batch")
    parser.add_argument("--steps", type=int, default=500, help="steps of the run")
    parser.add_argument(
        "--rates", help="JSON of --measure; default: an H200, assumed (--check: measured anew)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of --measure")
    parser.add_argument("--measure", metavar="FILE", help="measure this machine's rates and write them")
    parser.add_argument("--check", action="store_true", help="hold the model against real steps on this CPU")
    parser.add_argument("--output", help="JSON of the table, or of --check")
    args = parser.parse_args(argv)
    counts = ("gpus", "prompts", "group", "prompt_tokens", "token_budget", "steps")
    for name in (*counts, "updates", "epochs", "minibatches"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.new_tokens < 2:
        raise UserError(f"--new-tokens must be at least 2, got {args.new_tokens}")
    if args.lora_rank < 0:
        raise UserError(f"--lora-rank must be 0 or more, got {args.lora_rank}")
    if args.measure:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device found")
        if args.device == "cpu":
            torch.set_num_threads(1)
        widths = (128, 256, 512) if args.device == "cpu" else (896, 2048, 3584, 5120)
        found = measure_rates(args.device, widths=widths)
        found.save(Path(args.measure))
        print(f"{found.device}: {found.about}")
        return 0
    rates = Rates.load(Path(args.rates)) if args.rates else H200
    if args.check:
        from benchmarks.cost.check import check

        return check(Path(args.output) if args.output else None, rates if args.rates else None)
    console = Console(soft_wrap=True)
    entries: list[dict[str, Any]] = []
    lora = LoraSettings(rank=args.lora_rank) if args.lora_rank else None
    for name, config in _configs(args.size, args.model):
        job = Job(
            policy=config,
            reward=QWEN[args.reward_size].config() if args.reward_size else None,
            lora=lora,
            kl=not args.no_kl,
            updates=args.updates,
            epochs=args.epochs,
            minibatches=args.minibatches,
            prompts=args.prompts,
            group=args.group,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            token_budget=args.token_budget,
            gpus=args.gpus,
        )
        costs = [cost(algorithm, job, rates) for algorithm in ALGORITHMS]
        entries.append(entry(name, job, costs, steps=args.steps))
        console.print(table(entries[-1], rates))
    if args.output:
        record = {
            "benchmark": "cost-sizes",
            "rates": f"{rates.device}: {rates.about}",
            "assumed": not rates.measured,
            "commit": commit(),
            "models": entries,
        }
        write_atomically(Path(args.output), json.dumps(record, indent=1) + "\n")
    console.print(f"Rates: {rates.about}{'' if rates.measured else ' (ASSUMED, not measured)'}.")
    kl = "without a reference" if args.no_kl else "with a KL term"
    reader = f"of {args.reward_size}" if args.reward_size else "as large as the policy"
    console.print(
        f"The reward model is {reader}. GRPO compares the completions of a group, {kl}, and passes over them "
        f"{args.updates} x. PPO takes one completion of as many prompts: {args.epochs} epochs of {args.minibatches} "
        "minibatches. DPO trains on the best and the worst of a group; offline each pair serves three steps, and a "
        "step bears a third of sampling it."
    )
    return 0


def _configs(sizes: Sequence[str], model: str | None) -> list[tuple[str, PreTrainedConfig]]:
    if model:
        return [(model, pretrained.load_config(pretrained.locate(model, "model"), "model"))]
    for size in sizes:
        if size not in QWEN:
            hint = did_you_mean(size, QWEN)
            raise UserError(f"--size must be among {', '.join(QWEN)}, got {size!r}{hint}")
    return [(f"Qwen2.5 {size.upper()}", QWEN[size].config()) for size in sizes]


def entry(name: str, job: Job, costs: Sequence[Cost], *, steps: int) -> dict[str, Any]:
    """What every algorithm would cost at this size, for a table or a file: PFLOP, GiB, seconds, GPU-hours."""
    adapter = f", LoRA rank {job.lora.rank}" if job.lora else ""
    return {
        "model": f"{name}{adapter}",
        "gpus": job.gpus,
        "work": f"{job.prompts} prompts x {job.group}, {job.prompt_tokens} + {job.new_tokens} tokens",
        "steps": steps,
        "algorithms": {
            each.algorithm: {
                "pflop": {phase: work / 1e15 for phase, work in each.flops.items()},
                "gib": {part: size / GIB for part, size in each.memory.parts.items()},
                "peak_gib": each.memory.peak / GIB,
                "shared_out": each.memory.shards,
                "checkpointing": each.checkpointing,
                "fits": each.fits,
                "seconds": each.seconds,
                "step_s": each.step_s,
                "gpu_hours": steps * each.step_s * job.gpus / 3600,
            }
            for each in costs
        },
    }


def table(found: dict[str, Any], rates: Rates) -> Table:
    """An entry, phase by phase and part by part."""
    costs = found["algorithms"].values()
    drawn = Table(
        title=f"{found['model']} on {found['gpus']} x {rates.device}: {found['work']}", title_justify="left"
    )
    drawn.add_column("a step", no_wrap=True)
    for name in found["algorithms"]:
        drawn.add_column(name.replace("_", "\n"), justify="right")

    def rows(title: str, field: str) -> None:
        for key in dict.fromkeys(key for each in costs for key in each[field]):
            values = [each[field].get(key, 0.0) for each in costs]
            if any(values):
                drawn.add_row(f"{title}, {key.replace('_', ' ')}", *map(_number, values))

    rows("PFLOP", "pflop")
    drawn.add_row("PFLOP", *(_number(sum(each["pflop"].values())) for each in costs))
    drawn.add_section()
    rows("GiB", "gib")
    drawn.add_row("GiB, peak of a GPU", *(_number(each["peak_gib"]) for each in costs))
    drawn.add_row("shared out", *(each["shared_out"] for each in costs))
    drawn.add_row("checkpointing", *("yes" if each["checkpointing"] else "no" for each in costs))
    drawn.add_row("fits", *("yes" if each["fits"] else "NO" for each in costs))
    drawn.add_section()
    rows("seconds", "seconds")
    drawn.add_row("seconds", *(_number(each["step_s"]) for each in costs))
    drawn.add_row(f"GPU-hours of {found['steps']} steps", *(_number(each["gpu_hours"]) for each in costs))
    return drawn


def _number(value: float) -> str:
    if not value or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
