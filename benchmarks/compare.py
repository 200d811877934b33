"""What became slower between two measured runs of the suite, by more than the noise.

A run is {"machine": {...}, "commit", "date", "tests": {name: {"median_s", "repeats": [[seconds, ...], ...]}}}; each
repeat is one pytest process.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.step.timing import ratio_interval

ANCHOR = "benchmarks/test_kernels.py::test_loss_head[products-trained]"
"""The bare matrix products: what other tests are measured in where machines differ."""
LEAST = 0.05
"""A change of less than this share is never called one."""
ALIKE = ("device", "cores", "threads", "clock", "suite")
"""What must be the same of two runs for their seconds to be compared directly."""

Verdict = Literal["slower", "faster", "same", "new", "gone"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One test of two runs."""

    name: str
    verdict: Verdict
    before_s: float | None = None
    """Median of the baseline."""
    after_s: float | None = None
    ratio: float | None = None
    """after over before; of runs on different machines that of the tests' multiples of the bare products."""
    ci95: tuple[float, float] | None = None
    noise: float | None = None
    """A ratio within 1 ± this, or the inverse, is noise."""


def differences(baseline: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Sentences on what keeps two runs from being compared second by second; none where nothing does."""
    first, second = baseline["machine"], run["machine"]
    return [
        f"{key} {second.get(key)} here, {first.get(key)} in the baseline"
        for key in ALIKE
        if first.get(key) != second.get(key)
    ]


def compare(baseline: Mapping[str, Any], run: Mapping[str, Any]) -> list[Change]:
    """A verdict for each test of either run.

    Slower (or faster): the ratio of medians lies outside the noise, and so does 1 outside its 95% bootstrap interval.
    The noise is `LEAST`, or what a test's repeats within either run differ by, whichever is more. Where machines
    differ (`differences`), every test is measured in the same run's bare products first, and the products' own
    noise is added. ValueError where that needs a test which a run lacks.
    """
    relative = bool(differences(baseline, run))
    before, after = baseline["tests"], run["tests"]
    if relative and not (ANCHOR in before and ANCHOR in after):
        raise ValueError(f"the runs are of different machines and {ANCHOR} is not in both")
    changes = []
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after or name not in before:
            there = before.get(name) or after[name]
            median = statistics.median(merged(there))
            changes.append(
                Change(name=name, verdict="new", after_s=median)
                if name in after
                else Change(name=name, verdict="gone", before_s=median)
            )
            continue
        changes.append(_change(name, before, after, relative))
    return changes


def _change(name: str, before: Mapping[str, Any], after: Mapping[str, Any], relative: bool) -> Change:
    old, new = merged(before[name]), merged(after[name])
    scale = noise = 0.0
    if relative:
        scale = statistics.median(merged(after[ANCHOR])) / statistics.median(merged(before[ANCHOR]))
        noise = max(spread(before[ANCHOR]), spread(after[ANCHOR]))
    noise += max(LEAST, spread(before[name]), spread(after[name]))
    ratio, low, high = ratio_interval(new, [sample * (scale or 1.0) for sample in old], paired=False)
    verdict: Verdict = "same"
    if ratio > 1 + noise and low > 1:
        verdict = "slower"
    elif ratio < 1 / (1 + noise) and high < 1:
        verdict = "faster"
    return Change(
        name=name,
        verdict=verdict,
        before_s=statistics.median(old),
        after_s=statistics.median(new),
        ratio=ratio,
        ci95=(low, high),
        noise=noise,
    )


def merged(test: Mapping[str, Any]) -> list[float]:
    """All samples of a test."""
    return [sample for repeat in test["repeats"] for sample in repeat]


def spread(test: Mapping[str, Any]) -> float:
    """How far the medians of a test's repeats lie apart: the largest over the smallest, less 1."""
    medians = [statistics.median(repeat) for repeat in test["repeats"]]
    return max(medians) / min(medians) - 1


def thinned(samples: Sequence[float], most: int = 12) -> list[float]:
    """At most `most` samples that stand for all, evenly spaced in their order by size, four digits each."""
    ordered = sorted(samples)
    if len(ordered) > most:
        ordered = [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]
    return [float(f"{sample:.4g}") for sample in ordered]
