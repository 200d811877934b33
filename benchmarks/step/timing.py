"""Contenders take turns; every sample is kept."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch

clock: Callable[[], float] = time.perf_counter
"""What times a CPU's work: wall time, or `time.process_time` where other processes use the machine too."""


def seconds(
    run: Callable[[], Any], device: str = "cpu", *, timer: Callable[[], float] | None = None
) -> float:
    """Time of one call, the GPU's work included, by `timer` (None: `clock`)."""
    timer = timer or clock
    if device == "cuda":
        torch.cuda.synchronize()
    started = timer()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return timer() - started


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls, after `warmup` rounds. A contender that gives a float has timed itself."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(warmup + repeats):
        for name, run in contenders.items():
            returned: list[Any] = []
            measured = seconds(lambda run=run, returned=returned: returned.append(run()), device)
            if repeat >= warmup:
                samples[name].append(returned[0] if isinstance(returned[0], float) else measured)
        print(f"  round {repeat + 1} of {warmup + repeats}", file=sys.stderr, flush=True)
    return samples


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each contender."""
    return {name: statistics.median(found) for name, found in samples.items()}


def ratio_interval(
    ours: Sequence[float], theirs: Sequence[float], *, paired: bool, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The ratio of the medians, ours over theirs, and the ends of its 95% bootstrap interval.

    `paired`: sample i of both comes from the same round, so rounds are drawn; else each side's samples are drawn for
    themselves. ValueError where a side has none, or paired sides differ in length.
    """
    first, second = numpy.asarray(ours, float), numpy.asarray(theirs, float)
    if not first.size or not second.size or (paired and first.size != second.size):
        raise ValueError(f"{first.size} samples against {second.size}{' in pairs' if paired else ''}")
    draw = numpy.random.default_rng(seed)
    chosen = draw.integers(first.size, size=(draws, first.size))
    others = chosen if paired else draw.integers(second.size, size=(draws, second.size))
    ratios = numpy.median(first[chosen], axis=1) / numpy.median(second[others], axis=1)
    low, high = numpy.quantile(ratios, (0.025, 0.975))
    return float(numpy.median(first) / numpy.median(second)), float(low), float(high)
