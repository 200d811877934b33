"""How fast a machine does each kind of work: measured in a minute, kept as JSON; of an H200 assumed."""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from grpo_kernels import LossConfig, linear_grpo_loss, linear_logprob

from benchmarks.cost import flops
from benchmarks.cost.architecture import Architecture
from benchmarks.machine import commit, device_name
from benchmarks.step import timing
from benchmarks.step.work import Shape, model_of, tokenizer_of
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.sampling import draw
from grpo_fast.errors import UserError
from grpo_fast.models.head import head_of
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.packing import pack

Kind = Literal["forward", "training", "head", "head_trained", "decode"]
STATE_TRAFFIC = 28
"""Bytes a parameter of AdamW in float32: weight, gradient and two states read, weight and states written"""
LAYERS, VOCABULARY, ROWS = 2, 4096, (4, 32)
"""Of the models that are measured, and the rows that decode"""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine does in a second. FLOPs are counted as `flops.py` counts them."""

    device: str
    measured: bool
    """False: published peaks times a utilisation that is assumed"""
    about: str
    """Where the numbers come from"""
    widths: tuple[int, ...]
    """Hidden sizes that the next five are of; between them logarithms are interpolated, outside the nearest holds"""
    forward: tuple[float, ...]
    """FLOP/s of a packed forward pass through the layers, elementwise work included"""
    training: tuple[float, ...]
    """The same of forward and backward pass together"""
    head: tuple[float, ...]
    """FLOP/s of log-probs from the head"""
    head_trained: tuple[float, ...]
    """FLOP/s of the loss and its gradients at a trained head"""
    decode: tuple[float, ...]
    """FLOP/s of what grows with the rows of a decoding step, head included"""
    layer_s: float
    """Fixed seconds of one layer in one pass"""
    step_s: float
    """Fixed seconds of one decoding step beside its layers"""
    draw_s: float
    """Seconds of sampling, for each logit"""
    optimizer: float
    """Bytes/s of an AdamW step (`STATE_TRAFFIC`)"""
    bandwidth: float
    """Bytes/s of a copy, read and written"""
    memory: float = math.inf
    """Bytes one device has for tensors"""
    link: float = math.inf
    """Bytes/s from one device to the others"""

    def of(self, kind: Kind, width: int) -> float:
        """FLOP/s at a hidden size."""
        values: tuple[float, ...] = getattr(self, kind)
        place = bisect_left(self.widths, width)
        if place == 0 or place == len(self.widths):
            return values[min(place, len(values) - 1)]
        low, high = (math.log(x) for x in self.widths[place - 1 : place + 1])
        share = (math.log(width) - low) / (high - low)
        return math.exp((1 - share) * math.log(values[place - 1]) + share * math.log(values[place]))

    def save(self, path: Path) -> None:
        """As JSON, with the commit."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"commit": commit(), **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Rates:
        """What `save` wrote; UserError for another file."""
        try:
            found = json.loads(path.read_text())
            names = {field.name for field in fields(cls)}
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in names
            }
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            what = " ".join(str(error).split())
            raise UserError(
                f"rates {path}: {what}; `python -m benchmarks.cost.model --measure {path}` writes them"
            ) from error


H200 = Rates(
    device="NVIDIA H200",
    measured=False,
    about=(
        "published peaks (989 TFLOP/s dense bfloat16, 4.8 TB/s, 141 GB, 450 GB/s to the other GPUs) times assumed "
        "shares: 40% in layers, 60% in the head, 40% of decoding's arithmetic, 75% of memory and link; 20 µs a layer "
        "and 500 µs a decoding step beside it"
    ),
    widths=(1,),
    forward=(0.4 * 989e12,),
    training=(0.4 * 989e12,),
    head=(0.6 * 989e12,),
    head_trained=(0.6 * 989e12,),
    decode=(0.4 * 989e12,),
    layer_s=20e-6,
    step_s=500e-6,
    draw_s=40 / (0.75 * 4.8e12),  # ten passes over float32 logits
    optimizer=0.75 * 4.8e12,
    bandwidth=0.75 * 4.8e12,
    memory=0.92 * 141e9,
    link=0.75 * 450e9,
)


def measure_rates(device: str = "cpu", *, widths: Sequence[int] = (128, 256, 512), repeats: int = 3) -> Rates:
    """The rates of this machine at Qwen2 layers of these hidden sizes: float32 on the CPU, bfloat16 on a GPU.

    The CPU's clock is the process's own, so that others at work on the machine disturb less; it is right with one
    thread only.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found = [_at_width(width, device, dtype, repeats) for width in widths]
    wide = torch.empty(1 << (25 if device == "cpu" else 28), dtype=torch.float32, device=device)
    copied = wide.clone()
    copying = seconds(lambda: copied.copy_(wide), device, repeats)
    parameters = [torch.nn.Parameter(wide[: 1 << 23].clone().uniform_()) for _ in range(2)]
    optimizer = Optimizer(parameters, lr=1e-4)

    def update() -> float:
        for parameter in parameters:
            parameter.grad = parameter.detach() * 1e-3
        return seconds(lambda: optimizer.step(1e-4), device, 1)

    updating = min(update() for _ in range(repeats + 1))
    logits = wide[: 32 * VOCABULARY].view(32, VOCABULARY).normal_()
    uniform = torch.rand(32, dtype=torch.float64, device=device)
    drawing = seconds(lambda: draw(logits.clone(), uniform, Sampling(max_new_tokens=1)), device, repeats)
    draw_s = drawing / logits.numel()
    columns: dict[str, Any] = {name: tuple(row[name] for row in found) for name in found[0]}
    layer_s = min(columns.pop("layer_s"))
    fixed, rows = columns.pop("fixed_s"), columns.pop("row_s")
    decode = tuple(
        work / max(row - VOCABULARY * draw_s, 0.1 * row)
        for work, row in zip(columns.pop("row_flops"), rows, strict=True)
    )
    total = torch.cuda.get_device_properties(0).total_memory * 0.92 if device == "cuda" else math.inf
    return Rates(
        device=device_name(device),
        measured=True,
        about=f"measured, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        widths=tuple(widths),
        **columns,
        decode=decode,
        layer_s=layer_s,
        step_s=max(0.0, min(fixed) - LAYERS * layer_s),
        draw_s=draw_s,
        optimizer=STATE_TRAFFIC * 2 * (1 << 23) / updating,
        bandwidth=2 * wide.nbytes / copying,
        memory=total,
    )


def seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """The least of `repeats` calls after a first one (with 1: of that one)."""
    timer = time.process_time if device == "cpu" else time.perf_counter
    return min(timing.seconds(run, device, timer=timer) for _ in range(repeats + (repeats > 1)))


def _at_width(width: int, device: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Rates of a model of this hidden size."""
    heads = max(2, width // 64)
    shape = Shape(
        hidden=width, layers=LAYERS, heads=heads, key_heads=heads // 2, inner=3 * width, vocabulary=VOCABULARY
    )
    tokenizer = tokenizer_of(VOCABULARY)
    architecture = Architecture.of(shape.config(tokenizer))
    policy = Policy.from_model(model_of(shape, tokenizer, dtype=dtype, device=device), tokenizer)
    groups = 4 if device == "cpu" else 24

    def row(prompts: int, completions: int) -> Any:
        ids = [[1] * 32] * prompts
        owner = [i // completions for i in range(prompts * completions)]
        (batch,) = pack(ids, [[2] * 33] * len(owner), prompt_of=owner, token_budget=1 << 20)
        return batch.to(device)

    batch, short = row(groups, 8), row(1, 1)

    @torch.no_grad()
    def forward(which: Any = batch) -> None:
        policy.hidden_states(which)

    def training() -> None:
        states = policy.hidden_states(batch)
        states.backward(torch.ones_like(states))
        policy.zero_grad()

    short_s = seconds(lambda: forward(short), device, 5 * repeats)
    body = flops.body_forward(architecture, batch)
    each_s = seconds(forward, device, repeats)
    # what a pass costs however short it is, from a long and a short one
    rate = (body - flops.body_forward(architecture, short)) / max(each_s - short_s, 0.5 * each_s)
    layer_s = max(0.0, short_s - flops.body_forward(architecture, short) / rate) / LAYERS
    both = body + flops.body_backward(architecture, batch)
    trained = both / max(seconds(training, device, repeats) - 3 * LAYERS * layer_s, 1e-9)

    weight = head_of(policy.model).weight.detach().requires_grad_()
    count = 1024 if device == "cpu" else 16384
    hidden = torch.randn(count, width, dtype=dtype, device=device).requires_grad_()
    targets = torch.randint(VOCABULARY, (count,), device=device)
    advantages = torch.randn(count, device=device)

    @torch.no_grad()
    def look_up() -> None:
        linear_logprob(hidden, weight, targets)

    def loss() -> None:
        config = LossConfig.preset("dapo")
        linear_grpo_loss(hidden, weight, targets, advantages, config)[0].backward()

    fixed_s, row_s, row_flops = _decoding(policy, architecture, device, repeats)
    return {
        "forward": rate,
        "training": trained,
        "head": flops.head(architecture, count, "forward") / seconds(look_up, device, repeats),
        "head_trained": flops.head(architecture, count, "trained") / seconds(loss, device, repeats),
        "layer_s": layer_s,
        "fixed_s": fixed_s,
        "row_s": row_s,
        "row_flops": row_flops,
    }


def _decoding(
    policy: Policy, architecture: Architecture, device: str, repeats: int
) -> tuple[float, float, float]:
    """Seconds of a decoding step however few the rows, seconds of a row more, and a row's FLOPs."""
    engine = LocalEngine(policy.model)
    prompt, few, many = 32, 9, 33
    steps = []
    for rows in ROWS:
        longer, shorter = (
            seconds(
                lambda rows=rows, new=new: engine.generate(
                    [[1] * prompt] * (rows // 4), 4, Sampling(max_new_tokens=new), 0
                ),
                device,
                repeats,
            )
            for new in (many, few)
        )
        steps.append((longer - shorter) / (many - few))
    row_s = max((steps[1] - steps[0]) / (ROWS[1] - ROWS[0]), 1e-3 * steps[1] / ROWS[1])
    work = [flops.generation(architecture, [prompt], [new], 1) for new in (many, few)]
    read = flops.body_forward(architecture, PackedPlan.of_lengths([prompt]))
    assert work[0] > work[1] > read
    return max(steps[0] - ROWS[0] * row_s, 0.0), row_s, (work[0] - work[1]) / (many - few)
