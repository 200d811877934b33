"""How much memory the training device has."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CUDA_SHARE = 0.92
"""Of a GPU's memory, what tensors can have: the rest goes to the CUDA context and to fragments."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_bytes(device: torch.device) -> int:
    """What a run may use: a share of the GPU's memory, or the machine's or container's where that is less."""
    if device.type == "cuda":
        return int(CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for path in _CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min((limit for limit in limits if limit > 0), default=2**62)
