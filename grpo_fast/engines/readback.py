"""What a step drew, on its way to the host while the device goes on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor


def results_later(
    step: Callable[[int], Tensor],  # rows -> (2, rows) on the device, overwritten by the next step
    most: int,
    behind: int,
    device: torch.device,
) -> Callable[[int], Callable[[], list[list[float]]]]:
    """`step`, but its result is a function that waits for it; up to `behind` + 1 results may be awaited at once."""
    if device.type != "cuda":
        return lambda rows: (step(rows).clone() if behind else step(rows)).tolist

    buffers = cycle([torch.zeros(2, most, dtype=torch.float64).pin_memory() for _ in range(behind + 1)])

    def start(rows: int) -> Callable[[], list[list[float]]]:
        result = step(rows)
        host = next(buffers)[:, :rows]
        for there, here in zip(
            host, result, strict=True
        ):  # rows of a matrix are contiguous: plain async copies
            there.copy_(here, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[list[float]]:
            done.synchronize()
            return host.tolist()

        return wait

    return start
