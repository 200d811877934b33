"""One cell's curve, and two algorithms seed by seed: what a cost buys, what a quality costs, and how sure that is.

A cell is one run (algorithm x seed) of `benchmarks.cost`; its `curve` is a list of evaluations, each with all costs
spent so far and the quality reached. Between two evaluations both are taken as linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CURRENCIES = {
    "wall_s": "wall time",
    "generated_tokens": "generated tokens",
    "training_flops": "training FLOPs",
    "flops": "FLOPs in all",
    "cpu_s": "CPU time",
    "reward_calls": "reward-model calls",
}
LESS_IS_BETTER = {"over_refusal", "kl"}
RESAMPLES = 10_000
SEED = 20_240_406
LEVEL = 95
FEWEST = 5
"""Seeds without which no order is called certain."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two algorithms on one figure, paired by seed: ratio or difference of the second to the first.

    Each pair is known to lie within [low, high]; both ends are the same unless a run never got there.
    """

    what: str
    """The figure: a currency, `memory`, or a quality."""
    first: str
    """The algorithm that the other is measured against."""
    second: str
    """The other algorithm."""
    ratio: bool
    """True: second / first, averaged geometrically; False: second - first, averaged plainly."""
    seeds: tuple[int, ...]
    """Seeds that both have."""
    pairs: tuple[tuple[float, float], ...]
    """(low, high) of each seed's ratio or difference; (0 or -inf, inf): nothing is known."""
    estimate: tuple[float, float]
    """The average over seeds, between these ends."""
    interval: tuple[float, float] | None
    """95% bootstrap interval over seeds, widened by what is not known; None with fewer than two seeds."""

    @property
    def certain(self) -> bool:
        """At least five seeds, and both intervals exclude equality (1 of a ratio, 0 of a difference): the bootstrap's,
        and Student's over the seeds, since percentile intervals of so few values are too narrow."""
        equal = 1.0 if self.ratio else 0.0
        if len(self.pairs) < FEWEST or self.interval is None or self.interval[0] <= equal <= self.interval[1]:
            return False
        lows, highs = (
            [_log(end) if self.ratio else end for end in ends] for ends in zip(*self.pairs, strict=True)
        )
        return student(lows)[0] > 0 or student(highs)[1] < 0

    @property
    def level(self) -> bool:
        """The interval lies so close around equality that its digits in print show nothing else."""
        low, high = self.interval or (math.nan, math.nan)
        return (low > 0.995 and high < 1.005) if self.ratio else (low > -0.0005 and high < 0.0005)

    @property
    def known(self) -> bool:
        """At least one end of the average is finite (and of a ratio not 0)."""
        low, high = self.estimate
        return math.isfinite(high) or (low > 0 if self.ratio else math.isfinite(low))


def reading(point: dict[str, Any], quality: str) -> float:
    """One quality of an evaluation: `mean`, `worst`, an objective of the judge, `over_refusal`, `kl`, ...; or NaN."""
    value = point["judge"].get(quality, point.get(quality))
    return math.nan if value is None else float(value)


def track(cell: dict[str, Any], currency: str, quality: str) -> tuple[np.ndarray, np.ndarray]:
    """(costs, qualities) of the evaluations at which the quality was measured, in their order."""
    points = [(point[currency], reading(point, quality)) for point in cell["curve"]]
    known = [(cost, value) for cost, value in points if math.isfinite(value)]
    return np.array([cost for cost, _ in known], float), np.array([value for _, value in known], float)


def end(cell: dict[str, Any], currency: str) -> float:
    """What the run had spent at its last evaluation; 0 where it has none."""
    return float(cell["curve"][-1][currency]) if cell["curve"] else 0.0


def quality_at(cell: dict[str, Any], currency: str, cost: float, quality: str = "mean") -> float:
    """The quality after `cost`, between evaluations linear; NaN where nothing was measured.

    Past the last evaluation it is the last one's: that is all there is of a run that diverged or failed. Where
    several evaluations stand at one cost (training on pairs generates no token) it is the last of them.
    """
    costs, values = track(cell, currency, quality)
    if not len(costs):
        return math.nan
    after = int(np.searchsorted(costs, cost, side="right"))
    if after in (0, len(costs)):
        return float(values[0 if after == 0 else -1])
    share = (cost - costs[after - 1]) / (costs[after] - costs[after - 1])
    return float(values[after - 1] + share * (values[after] - values[after - 1]))


def cost_to_reach(cell: dict[str, Any], currency: str, level: float, quality: str = "mean") -> float:
    """The cost at which the curve first stands at `level` or better, between evaluations linear.

    inf: it never did (all that is known is that it takes more than `end`). A run that diverged or failed never
    reaches anything, also where it had been there before: what is left of it is no policy to keep.
    """
    if cell["status"] != "finished":
        return math.inf
    costs, values = track(cell, currency, quality)
    sign = -1.0 if quality in LESS_IS_BETTER else 1.0
    reached = np.flatnonzero(sign * values >= sign * level)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(costs[0])
    share = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(costs[i - 1] + share * (costs[i] - costs[i - 1]))


def compared(
    what: str,
    first: str,
    second: str,
    pairs: dict[int, tuple[tuple[float, float], tuple[float, float]]],
    *,
    ratio: bool,
) -> Comparison:
    """The second against the first over seeds, where each seed gives both figures as (low, high).

    A run that never reached the target has (spent, inf). Its pair is then known from one side only, and so are
    the average and the interval: the lower end comes from resamples of the pairs' lower ends, the upper one from
    those of their upper ends. No pair is left out, and none is given a number that nobody measured.
    """
    ends = [_ratio(*pair) if ratio else _difference(*pair) for pair in pairs.values()]
    low, high = _mean([low for low, _ in ends], -math.inf), _mean([high for _, high in ends], math.inf)
    interval = bootstrap(ends)
    back = _exp if ratio else float
    return Comparison(
        what=what,
        first=first,
        second=second,
        ratio=ratio,
        seeds=tuple(pairs),
        pairs=tuple((back(low), back(high)) for low, high in ends),
        estimate=(back(low), back(high)),
        interval=None if interval is None else (back(interval[0]), back(interval[1])),
    )


def bootstrap(ends: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """95% percentile interval of the mean of values known as (low, high), over 10,000 resamples; None below two.

    The generator starts from a fixed seed, so the same record gives the same interval. Percentile intervals of
    five values are too narrow: see the limits in docs/cost.md.
    """
    if len(ends) < 2:
        return None
    picks = np.random.default_rng(SEED).integers(len(ends), size=(RESAMPLES, len(ends)))
    lows, highs = np.array(ends, float).T
    tail = (100 - LEVEL) / 2
    with np.errstate(invalid="ignore"):  # inf - inf: unknown, so the far end
        low = np.nan_to_num(lows[picks].mean(1), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        high = np.nan_to_num(highs[picks].mean(1), nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return (
        float(np.percentile(low, tail, method="lower")),
        float(np.percentile(high, 100 - tail, method="higher")),
    )


def student(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of at least two values by Student's t; all numbers where one is not finite."""
    if not all(map(math.isfinite, values)):
        return -math.inf, math.inf
    from scipy.stats import t  # slow to load

    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (x, y) that no other one beats, x the less and y the more the better; by rising x.

    A point is beaten by one that is no worse in both and better in one.
    """
    front, best = [], -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        x, y = points[i]
        same = bool(front) and points[front[-1]] == (x, y)
        if y > best or same:
            front.append(i)
            best = y
    return front


def _ratio(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Ends of log(second / first)."""
    return _log_quotient(second[0], first[1], -math.inf), _log_quotient(second[1], first[0], math.inf)


def _log_quotient(above: float, below: float, unknown: float) -> float:
    if math.isnan(above) or math.isnan(below) or (math.isinf(above) and math.isinf(below)):
        return unknown
    if above == below:
        return 0.0
    if above == 0 or math.isinf(below):
        return -math.inf
    return math.inf if below == 0 or math.isinf(above) else math.log(above / below)


def _difference(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    low, high = second[0] - first[1], second[1] - first[0]
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)


def _mean(values: Sequence[float], unknown: float) -> float:
    if not values or (math.inf in values and -math.inf in values):
        return unknown
    return sum(values) / len(values)


def _log(value: float) -> float:
    return -math.inf if value <= 0 else math.log(value) if math.isfinite(value) else math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
