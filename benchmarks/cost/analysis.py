"""From a record of `python -m benchmarks.cost` to answers: targets, comparisons by seed, fronts.

Everything is a plain function over the record (see `benchmarks.cost.__main__` for its layout). Every comparison is
paired by seed: the cells of a seed share start policy, reward model, prompts and held-out prompts, and
`benchmarks.cost.terms` refuses a record in which they do not. Sentences are made from it in `benchmarks.cost.verdicts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.cost.curves import (
    Comparison,
    compared,
    cost_to_reach,
    end,
    pareto,
    quality_at,
    reading,
)

GRPO = "grpo"
BUDGETED = ("wall_s", "generated_tokens", "training_flops")
SHARES = (0.5, 0.75, 0.9)
LEVELS = (0.6, 0.7, 0.8)
HEADLINE = 0.75
STOPS = 8
SHORT = {
    "grpo": "GRPO",
    "grpo_scalarized": "GRPO scalarised",
    "grpo_no_kl": "GRPO without KL",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "ppo": "PPO",
    "ppo_shared": "PPO shared trunk",
    "dpo": "DPO offline",
    "dpo_online": "DPO online",
}
"""Names for tables and pictures; an algorithm that is not here goes by its title."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A quality to be reached."""

    name: str
    """How it is written in tables."""
    quality: str
    """`mean` or `worst`."""
    level: float
    """The score of the judge."""
    headline: bool = False
    """The one that sentences speak of."""


def name_of(record: dict[str, Any], algorithm: str) -> str:
    """An algorithm's name in tables, pictures and lists: without a comma."""
    title: str = record["algorithms"][algorithm]["title"]
    return SHORT.get(algorithm) or title.replace(",", "")


def cells_of(record: dict[str, Any], algorithm: str) -> dict[int, dict[str, Any]]:
    """The cells of an algorithm by seed, rising."""
    found = {cell["seed"]: cell for cell in record["cells"] if cell["algorithm"] == algorithm}
    return dict(sorted(found.items()))


def algorithms_of(record: dict[str, Any]) -> list[str]:
    """The algorithms that have a cell, in the record's order."""
    return [name for name in record["algorithms"] if cells_of(record, name)]


def rivals_of(record: dict[str, Any], families: Sequence[str] = ("ppo", "dpo")) -> list[str]:
    """The algorithms of these families that have a cell."""
    return [name for name in algorithms_of(record) if record["algorithms"][name]["family"] in families]


def objectives_of(record: dict[str, Any]) -> list[str]:
    """The judge's objectives, in its order."""
    return next((list(cell["curve"][0]["judge"]) for cell in record["cells"] if cell["curve"]), [])


def budgeted(record: dict[str, Any]) -> list[str]:
    """The currencies that had a budget."""
    return [money for money in BUDGETED if record["budget"].get(money)]


def measured(record: dict[str, Any], quality: str) -> bool:
    """Whether any evaluation has this quality."""
    return any(not math.isnan(reading(point, quality)) for cell in record["cells"] for point in cell["curve"])


def equal_cost(record: dict[str, Any], currency: str) -> float:
    """The cost at which qualities are compared: the budget; of a currency without one, the least that a finished run
    spent in all (nothing is compared beyond what everybody has spent)."""
    if currency in budgeted(record):
        return float(record["budget"][currency])
    return min((end(cell, currency) for cell in record["cells"] if cell["status"] == "finished"), default=0.0)


def mean_quality(
    record: dict[str, Any], algorithm: str, currency: str, cost: float, quality: str = "mean"
) -> float:
    """Average over an algorithm's seeds of the quality after `cost`; runs without any evaluation are NaN."""
    return fmean(quality_at(cell, currency, cost, quality) for cell in cells_of(record, algorithm).values())


def targets(record: dict[str, Any]) -> list[Target]:
    """The qualities whose costs are compared.

    Shares of what can be won: 50%, 75% and 90% of the gain from the start that the best algorithm, on average over
    seeds, still has when the first of its budgets is used up, so that somebody reaches each target within every
    budget. Half is where all are still climbing and even slow ones arrive; at 90% the curves are flat, a crossing
    hangs on the noise of single evaluations, and many never arrive; 75%, past the steep part and well below the
    plateau, is what the sentences speak of, for the mean of the objectives and for the worst one. Fixed levels of the
    mean (0.6, 0.7, 0.8) stay the same from record to record, as the shares do not. Levels at or below the start are
    left out; so is everything where nobody gained.
    """
    found = []
    for quality in ("mean", "worst"):
        starts = [quality_at(cell, "wall_s", 0.0, quality) for cell in record["cells"] if cell["curve"]]
        ends = [
            min(
                mean_quality(record, name, money, equal_cost(record, money), quality)
                for money in budgeted(record)
            )
            for name in algorithms_of(record)
        ]
        best = max((value for value in ends if not math.isnan(value)), default=-math.inf)
        start = fmean(starts) if starts else math.inf
        if not best > start:
            continue
        for share in SHARES if quality == "mean" else (HEADLINE,):
            level = start + share * (best - start)
            found.append(
                Target(
                    name=f"{share:.0%} of the best gain: {quality} {level:.3f}",
                    quality=quality,
                    level=level,
                    headline=share == HEADLINE,
                )
            )
        if quality == "mean":
            highest = max(starts)
            found += [
                Target(name=f"mean {level}", quality=quality, level=level)
                for level in LEVELS
                if level > highest
            ]
    return found


def headline(record: dict[str, Any], quality: str = "mean") -> Target | None:
    """The target that the sentences speak of; None where no algorithm gained."""
    return next((t for t in targets(record) if t.headline and t.quality == quality), None)


def compare_costs(
    record: dict[str, Any], target: Target, currency: str, second: str, first: str = GRPO
) -> Comparison:
    """How many times the first algorithm's cost the second needs to reach a target, by seed."""
    pairs = {
        seed: (_cost(record, a, currency, target), _cost(record, b, currency, target))
        for seed, a, b in _pairs(record, first, second)
    }
    return compared(currency, first, second, pairs, ratio=True)


def compare_qualities(
    record: dict[str, Any], currency: str, quality: str, second: str, first: str = GRPO
) -> Comparison:
    """By how much the second algorithm's quality at equal cost exceeds the first's, by seed.

    Where a run ended before the budget of this currency was used up (offline DPO has its pairs long before), both are
    read where it ended.
    """
    budget = equal_cost(record, currency)
    pairs = {}
    for seed, a, b in _pairs(record, first, second):
        cost = min([budget, *(end(cell, currency) for cell in (a, b) if cell["status"] == "finished")])
        x, y = quality_at(a, currency, cost, quality), quality_at(b, currency, cost, quality)
        pairs[seed] = ((x, x), (y, y))
    return compared(quality, first, second, pairs, ratio=False)


def compare_memory(record: dict[str, Any], second: str, first: str = GRPO) -> Comparison:
    """How many times the first algorithm's peak memory the second needs, by seed."""
    pairs = {seed: (_peak(a), _peak(b)) for seed, a, b in _pairs(record, first, second)}
    return compared("memory", first, second, pairs, ratio=True)


def fronts(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Points of every algorithm (averages over its seeds) and whether another one beats them.

    Name -> {"x", "y": axis labels, "points": [{"algorithm", "x", "y", "front"}]}. Along the runs, at eight equal
    steps to the budget: mean quality against wall time, all FLOPs, and KL from the start. At equal wall time, one
    point an algorithm: mean quality against peak memory, and the worst objective against over-refusal. What was not
    measured (over-refusal without a judge) has no points.
    """
    names = algorithms_of(record)
    ends = {money: equal_cost(record, money) for money in ("wall_s", "flops")}
    shares = [(i + 1) / STOPS for i in range(STOPS)]

    def at(name: str, share: float, quality: str = "mean", money: str = "wall_s") -> float:
        return mean_quality(record, name, money, share * ends[money], quality)

    found = {
        "wall_s": (
            "wall time, s",
            "mean",
            [(n, s * ends["wall_s"], at(n, s)) for n in names for s in shares],
        ),
        "flops": (
            "FLOPs in all",
            "mean",
            [(n, s * ends["flops"], at(n, s, money="flops")) for n in names for s in shares],
        ),
        "memory": (
            "peak memory, MiB",
            "mean",
            [
                (n, fmean(_peak(cell)[0] for cell in cells_of(record, n).values()) / 2**20, at(n, 1.0))
                for n in names
            ],
        ),
        "kl": (
            "KL from the start, nats a completion",
            "mean",
            [(n, at(n, s, "kl"), at(n, s)) for n in names for s in shares],
        ),
        "over_refusal": (
            "over-refusal",
            "worst objective",
            [(n, at(n, 1.0, "over_refusal"), at(n, 1.0, "worst")) for n in names],
        ),
    }
    result = {}
    for key, (x_label, y_label, points) in found.items():
        points = [(name, x, y) for name, x, y in points if not math.isnan(x + y)]
        best = set(pareto([(x, y) for _, x, y in points]))
        rows = [
            {"algorithm": name, "x": x, "y": y, "front": i in best} for i, (name, x, y) in enumerate(points)
        ]
        result[key] = {"x": x_label, "y": y_label, "points": rows}
    return result


def _pairs(record: dict[str, Any], first: str, second: str) -> list[tuple[int, dict, dict]]:
    a, b = cells_of(record, first), cells_of(record, second)
    return [(seed, a[seed], b[seed]) for seed in a if seed in b]


def _cost(record: dict[str, Any], cell: dict[str, Any], currency: str, target: Target) -> tuple[float, float]:
    """The cost to reach the target, twice; (spent, inf) where it was not reached.

    A run that broke off counts as having spent the budget: it was not going to arrive.
    """
    cost = cost_to_reach(cell, currency, target.level, target.quality)
    if math.isfinite(cost):
        return cost, cost
    spent = end(cell, currency)
    broke_off = cell["status"] != "finished"
    return (max(spent, record["budget"].get(currency) or spent) if broke_off else spent), math.inf


def _peak(cell: dict[str, Any]) -> tuple[float, float]:
    memory = cell.get("memory") or {}
    value = float(memory["peak"]) if memory.get("peak") else math.nan
    return value, value
