"""What a record says of the machine and the code it was made with, and how much memory this process holds."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions(*packages: str) -> dict[str, str]:
    """Of the packages that are installed; by default those that only some machines have."""
    found = {}
    for package in packages or ("triton", "liger_kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(kind: str) -> str:
    """What a record is of: the GPU's name, or the processor's."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def commit() -> str:
    """The commit that was measured; "+" after it: with changes that are in none."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
            )
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "kernels", "grpo_fast", "benchmarks/*.py")
    return (git("rev-parse", "HEAD") or "unknown") + ("+" if changed else "")


def resident(field: str) -> int:
    """Bytes of a line of this process's status: `VmRSS` now, `VmHWM` at the most. OSError where it has none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def forget_peak() -> None:
    """Set `VmHWM` back to `VmRSS`. OSError where the system has no such thing."""
    Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """Give the system back what the C library keeps of freed memory, so that it is not held by anyone (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
