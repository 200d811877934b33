"""What this machine can do, and what a run on it would use and why: `python -m grpo_fast.doctor`.

Attention back ends and loss-head kernels are really tried, on small cases, as a run tries them before it uses them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from grpo_kernels import linear_logprob
from grpo_kernels import reference as plain
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from grpo_fast.attention import backends
from grpo_fast.attention.backends import Case
from grpo_fast.memory.device import available_bytes
from grpo_fast.run.command import Parser, prepare_libraries, run_command
from grpo_fast.run.terminal import Terminal

GIB = 2**30
OPTIONAL = {
    "flash-attn": "attention, on GPUs that torch's own is slower on",
    "liger-kernel": "policy.liger",
    "torchao": "optim.optimizer adamw8bit",
    "bitsandbytes": "policy.quantize nf4",
    "wandb": "run.wandb",
}
LITTLE_DISK = 5 * GIB
LITTLE_MEMORY = 2 * GIB
HEADS = {"Qwen2.5 0.5B": (14, 2, 64), "Qwen2.5 7B": (28, 4, 128)}  # query heads, key heads, width
HEAD_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest error of a log-prob on the trial, in nats."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    part: str
    what: str
    says: str
    state: Literal["fine", "note", "problem"] = "fine"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit code 0, or 1 where something must be mended before a run can go well."""
    run_command(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m grpo_fast.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs will be kept")
    parser.add_argument("--json", action="store_true", help="one JSON object in the place of the table")
    args = parser.parse_args(argv)
    prepare_libraries(0)
    findings = examine(args.folder)
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        console = Terminal(soft_wrap=True)
        console.print(table(findings))
        console.print(verdict(findings), style="bold")
    return 1 if any(finding.state == "problem" for finding in findings) else 0


def verdict(findings: Sequence[Finding]) -> str:
    """The report in one line."""
    wrong = [finding.what for finding in findings if finding.state == "problem"]
    noted = [finding.what for finding in findings if finding.state == "note"]
    if wrong:
        return f"to be mended before a run can go well: {', '.join(wrong)}"
    return "a run can go well here" + (f"; worth knowing: {', '.join(noted)}" if noted else "")


def table(findings: Sequence[Finding]) -> Table:
    """The report for a terminal."""
    drawn = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        drawn.add_column(overflow="fold")
    colours, last = {"fine": "green", "note": "yellow", "problem": "red bold"}, ""
    for finding in findings:
        drawn.add_row(
            "" if finding.part == last else Text(finding.part, style="bold"),
            finding.what,
            finding.says,
            style=None if finding.state == "fine" else colours[finding.state],
        )
        last = finding.part
    return drawn


def examine(folder: Path) -> list[Finding]:
    """Everything, in the order of the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        *software(),
        *devices(),
        *attention(device),
        *loss_head(device),
        *engine(device),
        *compiler(device),
        *room(device, folder),
    ]


def software() -> list[Finding]:
    """Python and the packages the project asks for, held against the versions it asks for."""
    found = [Finding(part="software", what="Python", says=f"{platform.python_version()} ({sys.executable})")]
    for line in requires("grpo-fast") or () if _installed("grpo-fast") else ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        has = _installed(wanted.name)
        fits = has is not None and wanted.specifier.contains(has, prereleases=True)
        says = has or "is not installed"
        if not fits:
            says += f"; {wanted.specifier} is needed: pip install '{wanted.name}{wanted.specifier}'"
        found.append(
            Finding(part="software", what=wanted.name, says=says, state="fine" if fits else "problem")
        )
    for name, use in OPTIONAL.items():
        has = _installed(name)
        if not any(finding.what == name for finding in found):
            found.append(
                Finding(part="software", what=f"{name} (optional)", says=has or f"not installed; for {use}")
            )
    return found


def devices() -> list[Finding]:
    """Every GPU with its memory, or why there is none."""
    part, built, driver = "devices", torch.version.cuda, _driver()
    if not torch.cuda.is_available():
        if built is None:
            why = "this PyTorch has no CUDA in it"
        else:
            why = f"this PyTorch is built for CUDA {built} and finds no device: " + (
                f"driver {driver} may be too old for it, or the GPUs are hidden (CUDA_VISIBLE_DEVICES)"
                if driver
                else "no NVIDIA driver answers (nvidia-smi)"
            )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return [
            Finding(part=part, what="GPU", says=f"none: {why}", state="note"),
            Finding(part=part, what="CPU", says=f"{cores} cores, {torch.get_num_threads()} threads"),
        ]
    says = f"{driver or 'unknown'}; this PyTorch is built for CUDA {built}"
    found = [Finding(part=part, what="driver", says=says)]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            Finding(
                part=part,
                what=f"cuda:{index}",
                says=f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {free / GIB:.1f} of "
                f"{total / GIB:.1f} GiB free",
                state="fine" if free > 0.9 * total else "note",
            )
        )
    return found


def attention(device: torch.device) -> list[Finding]:
    """Which back end packed rows would use, and why the faster ones are not taken."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    unfit = [backend.name for backend in backends.TABLE if device.type not in backend.devices]
    found: list[Finding] = []
    for name, (heads, key_heads, dim) in HEADS.items():
        case = Case(device, dtype, heads, key_heads, dim, dim, False, None, False)
        why: list[str] = []
        for backend in backends.TABLE:
            fault = backend.lacks(case) or backends.fault(backend, case)
            if fault is None:
                slow = device.type == "cuda" and backend.choice in backends.SLOW
                says = backend.name
                if backend is not backends.REFERENCE:
                    says += ": the fastest that reproduces the reference here"
                why += [f"{', '.join(unfit)}: not for a {device.type.upper()}"] if unfit and not why else []
                says += f" ({'; '.join(why)})" if why else ""
                found.append(
                    Finding(
                        part="attention", what=f"heads of {name}", says=says, state="note" if slow else "fine"
                    )
                )
                break
            if device.type in backend.devices:
                why.append(f"{backend.name} {fault}")
    return found


def loss_head(device: torch.device) -> list[Finding]:
    """Every backend of the loss head, tried against plain PyTorch in float64."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(96, 64, generator=generator, device=device).to(dtype)
    weight = torch.randn(1000, 64, generator=generator, device=device).to(dtype)
    targets = torch.randint(1000, (96,), generator=generator, device=device)
    true, _ = plain.linear_logprob(hidden.double(), weight.double(), targets)
    found: list[Finding] = []
    for backend in ("triton", "fused", "torch") if device.type == "cuda" else ("torch",):
        try:
            logprobs, _ = linear_logprob(hidden, weight, targets, backend=backend)
            error = (logprobs.double() - true).abs().max().item()
        except Exception as failure:  # compilers raise kinds of their own
            says = f"failed: {(f'{type(failure).__name__}: {failure}'.splitlines() or [''])[0]}"
            found.append(Finding(part="loss head", what=backend, says=says, state="problem"))
            continue
        fine = error <= HEAD_LIMIT[dtype]
        taken = ""
        if backend == ("triton" if device.type == "cuda" else "torch"):
            taken = ": auto takes this one" + (" (triton and fused need a GPU)" if backend == "torch" else "")
        found.append(
            Finding(
                part="loss head",
                what=backend,
                says=f"largest error {error:.1e} nats{taken}",
                state="fine" if fine else "problem",
            )
        )
    return found


def engine(device: torch.device) -> list[Finding]:
    """How the built-in engine would decode, and whether a vLLM program is at hand."""
    if device.type == "cuda":
        says = "pages read by a split-key Triton kernel, steps as CUDA graphs; each checked when a run first uses it"
    else:
        says = "dense caches, one pass a token: pages and CUDA graphs need a GPU"
    found = shutil.which("vllm")
    vllm = (
        f"{found}: --engine.kind vllm --engine.executable {found}" if found else "no vllm program on the path"
    )
    return [
        Finding(part="engine", what="built in", says=says),
        Finding(part="engine", what="vLLM (optional)", says=vllm if device.type == "cuda" else "needs a GPU"),
    ]


def compiler(device: torch.device) -> list[Finding]:
    """What torch.compile and Triton's launchers need."""
    names = ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang")
    path = next(filter(None, map(shutil.which, names)), None)
    says = path or f"none of {', '.join(names)}: policy.compile and Triton's launchers need one"
    state = "fine" if path else ("problem" if device.type == "cuda" else "note")
    return [Finding(part="compiler", what="C" if device.type == "cuda" else "C++", says=says, state=state)]


def room(device: torch.device, folder: Path) -> list[Finding]:
    """Memory that is free, and disk where runs and downloaded models are kept."""
    limit, free = available_bytes(torch.device("cpu")), _free_host_bytes()
    says = f"{free / GIB:.1f} of {limit / GIB:.1f} GiB free" if free else f"{limit / GIB:.1f} GiB"
    crowded = free is not None and free < LITTLE_MEMORY
    found = [Finding(part="room", what="memory", says=says, state="note" if crowded else "fine")]
    if device.type == "cuda":
        says = f"{available_bytes(device) / GIB:.1f} GiB of {device} is what a run plans with"
        found.append(Finding(part="room", what="memory of the GPU", says=says))
    return [*found, _disk("disk", folder, written=True), _disk("disk for models", Path(HF_HUB_CACHE))]


def _disk(what: str, folder: Path, *, written: bool = False) -> Finding:
    """The room where `folder` is or would be made; `written`: nothing works where it may not be."""
    here = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(here).free
    writable = os.access(here, os.W_OK)
    says = f"{free / GIB:.1f} GiB free at {here}" + ("" if writable else ", which may not be written")
    state = (
        "problem" if written and not writable else "note" if free < LITTLE_DISK or not writable else "fine"
    )
    return Finding(part="room", what=what, says=says, state=state)


def _free_host_bytes() -> int | None:
    """Memory that processes could still have, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver's version, as its own tool tells it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None)


if __name__ == "__main__":
    main()
