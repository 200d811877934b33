"""Which of the ways to compute packed attention is used: a table, and a check of each against the reference.

`choose` goes through the table from the fastest to the one that can do everything, and takes the first that offers
what the layer needs and, tried once on a small case with shared prefixes, forward and backward, gives the reference's
numbers. So a release that changes what a kernel computes costs speed and never correctness. `use` (the setting
`policy.attention`) leaves only some rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.attention import fused, paths
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.attention.tiles import tiled
from grpo_fast.errors import UserError

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32)
LIMITS = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest relative error of a back end on the probe; 0.03 for the half precisions."""

log = logging.getLogger(__name__)


class Case(NamedTuple):
    """What one layer asks for; back ends are tried once for each."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    dim: int
    value_dim: int
    windowed: bool
    softcap: float | None
    sinks: bool


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute packed attention, and what it can."""

    name: str
    choice: str
    """The value of `policy.attention` that asks for it"""
    run: Callable[..., Tensor]
    """(q, k, v, plan, scale=, window=, softcap=, sinks=) -> out, as `paths.padded`"""
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    module: str = ""
    """Module that must be importable"""
    softcap: bool = False
    sinks: bool = False
    max_dim: int = 1 << 30
    same_dims: bool = False
    """Whether values must be as wide as keys"""
    least_keys: int = 0
    """Rows with fewer keys to a query, on the average, are faster elsewhere"""

    def lacks(self, case: Case) -> str | None:
        """Why it cannot serve this case, None where it might."""
        reasons = (
            (case.device.type not in self.devices, f"does not run on {case.device.type}"),
            (case.dtype not in self.dtypes, f"does not take {str(case.dtype).removeprefix('torch.')}"),
            (bool(case.softcap) and not self.softcap, "has no softcap"),
            (case.sinks and not self.sinks, "has no attention sinks"),
            (max(case.dim, case.value_dim) > self.max_dim, f"takes heads up to {self.max_dim} wide"),
            (self.same_dims and case.dim != case.value_dim, "needs values as wide as keys"),
            (bool(self.module) and not _importable(self.module), f"{self.module} is not installed"),
        )
        return next((why for found, why in reasons if found), None)


def _flex(*args: Any, **options: Any) -> Tensor:
    from grpo_fast.attention.flex import flex  # it brings the compiler along

    return flex(*args, **options)


REFERENCE = Backend(
    name="padded rectangles",
    choice="reference",
    run=paths.padded,
    devices=("cpu", "cuda"),
    dtypes=(*FLOATS, torch.float64),
    softcap=True,
    sinks=True,
)
TABLE = (
    Backend(
        name="flash-attn 4",
        choice="flash",
        run=fused.flash4,
        devices=("cuda",),
        dtypes=HALF,
        module="flash_attn.cute",
        softcap=True,
        max_dim=256,
    ),
    Backend(
        name="flash-attn 3",
        choice="flash",
        run=fused.flash3,
        devices=("cuda",),
        dtypes=HALF,
        module="flash_attn_interface",
        softcap=True,
        max_dim=256,
    ),
    Backend(
        name="torch varlen_attn",
        choice="torch",
        run=fused.torch_varlen,
        devices=("cuda",),
        dtypes=HALF,
        module="torch.nn.attention.varlen",
        max_dim=256,
        same_dims=True,
    ),
    Backend(
        name="flash-attn 2",
        choice="flash",
        run=fused.flash2,
        devices=("cuda",),
        dtypes=HALF,
        module="flash_attn.flash_attn_interface",
        softcap=True,
        max_dim=256,
        same_dims=True,
    ),
    Backend(
        name="FlexAttention",
        choice="flex",
        run=_flex,
        devices=("cuda",),
        dtypes=HALF,
        softcap=True,
        sinks=True,
    ),
    Backend(
        name="merged SDPA tiles",
        choice="sdpa",
        run=tiled,
        devices=("cpu",),
        sinks=True,
        same_dims=True,
        least_keys=64,
    ),
    Backend(
        name="SDPA on each segment",
        choice="sdpa",
        run=paths.by_segment,
        devices=("cpu", "cuda"),
        least_keys=1024,
    ),
    REFERENCE,
)
CHOICES = ("auto", *dict.fromkeys(backend.choice for backend in TABLE))
SLOW = ("sdpa", "reference")
"""Choices that deserve a warning on a CUDA device."""

_wanted = "auto"


def use(choice: str) -> None:
    """Restrict this process to the back ends of one `policy.attention`, or to none with auto.

    Raises UserError for an unknown name.
    """
    global _wanted
    if choice not in CHOICES:
        raise UserError(f"policy.attention must be one of {', '.join(CHOICES)}, got {choice!r}")
    _wanted = choice


def check_choice(choice: str, device: torch.device) -> None:
    """UserError, before a model is loaded, where no back end of this choice can run on the device."""
    rows = [backend for backend in TABLE if choice in ("auto", backend.choice)]
    missing = [
        f"{b.name} needs {' or '.join(b.devices)}"
        if device.type not in b.devices
        else f"{b.module} is not installed"
        for b in rows
        if device.type not in b.devices or (b.module and not _importable(b.module))
    ]
    if len(missing) == len(rows):
        raise UserError(f"policy.attention = {choice}: {'; '.join(dict.fromkeys(missing))}; use auto")


def choose(case: Case, plan: PackedPlan) -> Backend:
    """The back end for one layer; UserError where the one asked for cannot serve it."""
    rows = [backend for backend in TABLE if _wanted in ("auto", backend.choice)]
    for backend in rows:
        fits = plan.keys_per_query >= backend.least_keys or _wanted == backend.choice
        if fits and backend.lacks(case) is None and fault(backend, case) is None:
            _say(backend, case)
            return backend
    why = (f"{b.name} {b.lacks(case) or fault(b, case)}" for b in rows)
    raise UserError(f"policy.attention = {_wanted}: {'; '.join(why)}; use auto")


@cache
def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@cache
def fault(backend: Backend, case: Case) -> str | None:
    """Try a back end once on a shared-prefix case against `REFERENCE`, forward and backward; None where it holds."""
    if backend is REFERENCE:
        return None
    device = case.device
    plan = PackedPlan((70, 3, 33, 140, 5), (0, 0, 0, 0, 106), (0, 70, 70, 0, 140), device)
    generator = torch.Generator(device).manual_seed(0)
    window, size = (17 if case.windowed else None), plan.length
    shapes = [
        (size, case.heads, case.dim),
        (size, case.key_heads, case.dim),
        (size, case.key_heads, case.value_dim),
    ]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(case.dtype)

    def run(path: Callable[..., Any]) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in values]
        sinks = inputs[3] if case.sinks else None
        scale = case.dim**-0.5
        out = path(*inputs[:3], plan, scale=scale, window=window, softcap=case.softcap, sinks=sinks)
        out.backward(grad)
        return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]

    values = [random(*shape) for shape in shapes] + ([random(case.heads)] if case.sinks else [])
    grad = random(size, case.heads, case.value_dim)
    try:
        # Tried in the middle of a layer's forward pass: what the trial saves is not that layer's, which a checkpoint
        # around it would count and then miss when it recomputes.
        own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.inference_mode(False), torch.enable_grad(), own:
            pairs = zip(run(backend.run), run(REFERENCE.run), strict=True)
            worst = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
    except Exception as error:  # compilers and foreign kernels raise kinds of their own
        reason = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
        log.info("attention: %s is not usable for %s: %s", backend.name, case, reason)
        return f"failed: {reason}"
    if not worst < LIMITS.get(case.dtype, 0.03):
        log.warning("attention: %s differs from the reference by %.3g; not used", backend.name, worst)
        return f"differs from the reference by {worst:.3g}"
    return None


@cache
def _say(backend: Backend, case: Case) -> None:
    slow = case.device.type == "cuda" and backend.choice in SLOW
    what = ["window"] * case.windowed + [f"softcap {case.softcap}"] * bool(case.softcap)
    what += ["sinks"] * case.sinks
    detail = f" with {', '.join(what)}" if what else ""
    log.log(
        logging.WARNING if slow else logging.INFO,
        "attention: %s for %s on %s%s%s",
        backend.name,
        str(case.dtype).removeprefix("torch."),
        case.device,
        detail,
        ": no fused kernel offers this" if slow else "",
    )
