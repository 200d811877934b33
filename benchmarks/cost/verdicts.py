"""The answers of a record in sentences, made from its intervals alone: also where GRPO loses or nothing is sure."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from benchmarks.cost.analysis import (
    GRPO,
    Target,
    algorithms_of,
    cells_of,
    compare_costs,
    compare_memory,
    compare_qualities,
    equal_cost,
    headline,
    mean_quality,
    measured,
    name_of,
    rivals_of,
)
from benchmarks.cost.curves import CURRENCIES, LESS_IS_BETTER, Comparison, cost_to_reach

COSTS = ("wall_s", "generated_tokens", "training_flops", "flops", "reward_calls")
QUALITIES = {"mean": "mean of the objectives", "worst": "worst objective", "over_refusal": "over-refusal"}
NAMES = {**CURRENCIES, "memory": "peak memory", **QUALITIES}


def verdicts(record: dict[str, Any]) -> list[str]:
    """What the record says on GRPO against PPO and DPO: a sentence on each figure, then one on each rival.

    `ahead` and `loses` are said only where the 95% interval over seeds excludes equality; all else is uncertain.
    """
    return on_figures(record) + on_rivals(record)


def on_figures(record: dict[str, Any]) -> list[str]:
    """One sentence a figure, on all rivals; or why there is nothing to say."""
    if GRPO not in algorithms_of(record):
        return ["GRPO was not measured, so there is nothing to compare with."]
    rivals = rivals_of(record)
    if not rivals:
        return ["Neither PPO nor DPO was measured, so there is nothing to compare with."]
    found = []
    if headline(record) is None:
        found.append(
            "No algorithm was better at the end of its budget than at the start: no cost to compare."
        )
    outcomes = {rival: comparisons(record, rival) for rival in rivals}
    return found + [
        _on_figure(record, figure, {rival: outcomes[rival][figure] for rival in rivals})
        for figure in outcomes[rivals[0]]
    ]


def on_rivals(record: dict[str, Any]) -> list[str]:
    """One entry a rival, with all figures and their intervals."""
    if GRPO not in algorithms_of(record):
        return []
    return [_on_rival(record, rival, comparisons(record, rival)) for rival in rivals_of(record)]


def comparisons(record: dict[str, Any], rival: str, first: str = GRPO) -> dict[str, Comparison]:
    """Every figure on which a rival is held against GRPO, by name: costs to reach the headline target (without those
    where nobody gained), peak memory, and qualities at equal wall time."""
    target = headline(record)
    costs = COSTS if target is not None else ()
    found = {money: compare_costs(record, target, money, rival, first) for money in costs if target}
    found["memory"] = compare_memory(record, rival, first)
    found |= {
        name: compare_qualities(record, "wall_s", name, rival, first)
        for name in QUALITIES
        if measured(record, name)
    }
    return found


def standing(comparison: Comparison) -> str:
    """Where the first algorithm is: `ahead`, `behind`, `level` or `uncertain`."""
    if comparison.level:
        return "level"
    if not comparison.certain or comparison.interval is None:
        return "uncertain"
    more = comparison.interval[0] > (1 if comparison.ratio else 0)
    less_is_better = comparison.ratio or comparison.what in LESS_IS_BETTER
    return "ahead" if more == less_is_better else "behind"


def choices(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what counts, the best algorithm, those that the seeds do not tell from it) for someone who has to choose.

    The best is the one with the best average over seeds; of costs, among those that reach the headline target with
    every seed. An algorithm is told from it where the 95% interval of their comparison excludes equality.
    """
    names, target = algorithms_of(record), headline(record)
    title = {name: name_of(record, name) for name in names}
    found = []
    qualities = [name for name in QUALITIES if measured(record, name)]
    for figure in (*(COSTS if target else ()), "memory", *qualities):
        score = {name: _score(record, name, figure, target) for name in names}
        known = {name: value for name, value in score.items() if math.isfinite(value)}
        if not known:
            found.append((NAMES[figure], "none gets there with every seed", ""))
            continue
        best = min(known, key=known.__getitem__)
        others = [name for name in names if name != best]
        same = [
            name
            for name in others
            if standing(_compare(record, figure, target, name, best)) in ("level", "uncertain")
        ]
        found.append((NAMES[figure], title[best], ", ".join(title[name] for name in same) or "none"))
    return found


def figure_text(comparison: Comparison) -> str:
    """`ratio_text` or `difference_text`, whichever it is."""
    return ratio_text(comparison) if comparison.ratio else difference_text(comparison)


def ratio_text(comparison: Comparison) -> str:
    """`2.31 [1.92, 2.80]`; `≥` and `≤` where a run never reached the target; `?` where the order is uncertain."""
    low, high = comparison.estimate
    if not comparison.known:
        return "unknown ?"
    if comparison.level:
        return "1.00, level"
    if math.isfinite(high) and low > 0:
        text = f"{low:.2f}" + (
            f" [{comparison.interval[0]:.2f}, {_upper(comparison.interval[1])}]"
            if comparison.interval
            else ""
        )
    elif low > 0:
        text = f"≥ {low:.2f}" + (f" [≥ {comparison.interval[0]:.2f}]" if comparison.interval else "")
    else:
        text = f"≤ {high:.2f}" + (f" [≤ {comparison.interval[1]:.2f}]" if comparison.interval else "")
    return text if comparison.certain else f"{text} ?"


def difference_text(comparison: Comparison) -> str:
    """`-0.051 [-0.070, -0.030]`; `?` where the order is uncertain."""
    low, high = comparison.estimate
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unknown ?"
    if comparison.level:
        return "0.000, level"
    text = f"{low:+.3f}"
    if comparison.interval:
        text += f" [{comparison.interval[0]:+.3f}, {comparison.interval[1]:+.3f}]"
    return text if comparison.certain else f"{text} ?"


def _on_figure(record: dict[str, Any], figure: str, found: dict[str, Comparison]) -> str:
    """Of all rivals on one figure: whom GRPO beats, to whom it loses, and where the seeds do not tell.

    In brackets theirs: in times GRPO's, or less GRPO's.
    """
    title = {name: name_of(record, name) for name in found}
    parts = []
    for place, text in (
        ("ahead", "GRPO is ahead of"),
        ("behind", "GRPO loses to"),
        ("level", "GRPO is level with"),
        ("uncertain", "the order is uncertain against"),
    ):
        names = [
            title[name] + (f" ({figure_text(comparison)})" if place != "level" else "")
            for name, comparison in found.items()
            if standing(comparison) == place
        ]
        if names:
            parts.append(f"{text} {_listed(names)}")
    head = NAMES[figure][:1].upper() + NAMES[figure][1:]
    if figure in CURRENCIES:
        target = headline(record)
        head += f" to reach a {target.quality} of {target.level:.3f}" if target else ""
    elif figure in QUALITIES:
        head += f" after {equal_cost(record, 'wall_s'):.0f} s"
    return f"{head}: {'; '.join(parts)}."


def _on_rival(record: dict[str, Any], rival: str, found: dict[str, Comparison]) -> str:
    """All figures of one rival, with intervals."""
    seeds = len(found["memory"].seeds)
    costs = [
        f"{NAMES[name]} {ratio_text(comparison)}" for name, comparison in found.items() if comparison.ratio
    ]
    differences = [
        f"{NAMES[name]} {difference_text(comparison)}"
        for name, comparison in found.items()
        if not comparison.ratio
    ]
    text = f"{name_of(record, rival)} over {seeds} seed{'s' if seeds != 1 else ''}"
    text += " (one seed gives no interval)" if seeds == 1 else ""
    text += f", in times GRPO's: {_listed(costs)}."
    if differences:
        text += f" At equal wall time, less GRPO's: {_listed(differences)}."
    target = headline(record)
    if target is not None:
        text += "".join(
            f" {name_of(record, name)} reached the target with {reached} of {len(cells)} seeds."
            for name in (GRPO, rival)
            if (cells := cells_of(record, name))
            and (reached := reached_by(record, name, target)) < len(cells)
        )
    return text


def reached_by(record: dict[str, Any], algorithm: str, target: Target) -> int:
    """The number of an algorithm's seeds that reached a target."""
    cells = cells_of(record, algorithm).values()
    return sum(math.isfinite(cost_to_reach(cell, "wall_s", target.level, target.quality)) for cell in cells)


def _score(record: dict[str, Any], name: str, figure: str, target: Target | None) -> float:
    """What `choices` minimises: the average over seeds."""
    cells = cells_of(record, name).values()
    if figure in QUALITIES:
        value = mean_quality(record, name, "wall_s", equal_cost(record, "wall_s"), figure)
        return value if figure in LESS_IS_BETTER else -value
    if figure == "memory":
        return fmean(float((cell.get("memory") or {}).get("peak") or math.nan) for cell in cells)
    if target is None:
        return math.nan
    costs = [cost_to_reach(cell, figure, target.level, target.quality) for cell in cells]
    return math.exp(fmean(math.log(cost) for cost in costs)) if min(costs) > 0 else min(costs)


def _compare(
    record: dict[str, Any], figure: str, target: Target | None, second: str, first: str
) -> Comparison:
    if figure in QUALITIES:
        return compare_qualities(record, "wall_s", figure, second, first)
    if figure == "memory" or target is None:
        return compare_memory(record, second, first)
    return compare_costs(record, target, figure, second, first)


def _upper(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
