"""A record as pictures: one PNG a question, each readable at a width of 1000 pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from benchmarks.cost.analysis import (
    GRPO,
    algorithms_of,
    budgeted,
    cells_of,
    compare_costs,
    compare_memory,
    equal_cost,
    fronts,
    headline,
    measured,
    name_of,
    objectives_of,
)
from benchmarks.cost.curves import CURRENCIES, Comparison, end, quality_at
from benchmarks.cost.tables import PARTS, PHASES, number
from benchmarks.cost.terms import mixed

matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $

FAMILIES = {  # tones of a family, darkest first; within one the line style tells them apart too
    "grpo": ("#0b4f8a", "#3f8fd2", "#93c4ee"),
    "reinforce": ("#1b7f4d", "#7cc79b"),
    "ppo": ("#b8330e", "#f08a5d"),
    "dpo": ("#6a3d9a", "#b08fd8"),
}
STYLES = ("-", "--", ":")
PART_COLOURS = ("#0b4f8a", "#93c4ee", "#b8330e", "#7cc79b", "#e9c46a", "#b08fd8", "#b8b8b8")
PHASE_COLOURS = ("#3f8fd2", "#7cc79b", "#93c4ee", "#f08a5d", "#0b4f8a")
WIDTH = 10.0
GRID = 60


def draw(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write every picture that the record has figures for to FOLDER/STEM-NAME.png; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in PICTURES.items():
        with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            figure = make(record)
            if figure is None:
                continue
            if said := mixed(record):
                figure.text(0.5, 1.01, "\n".join(said), ha="center", va="bottom", color="#b8330e")
            path = folder / f"{stem}-{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            paths.append(path)
    return paths


def quality(record: dict[str, Any]) -> Figure | None:
    """Mean quality against each currency: the average over seeds, and the span of the seeds as a band.

    A cross is where a run diverged or failed; from there on its last quality is held. Dotted: the budget.
    """
    names = algorithms_of(record)
    if not names:
        return None
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 6.2), sharey=True, layout="constrained")
    for axis, money in zip(axes.flat, CURRENCIES, strict=True):
        for name in names:
            cells = list(cells_of(record, name).values())
            last = max(end(cell, money) for cell in cells)
            if last <= 0:
                continue
            own = [point[money] for cell in cells for point in cell["curve"]]
            costs = np.unique([*np.linspace(0, last, GRID), *own])
            values = np.array([[quality_at(cell, money, cost) for cost in costs] for cell in cells])
            colour, style = look(record, name)
            axis.plot(costs, values.mean(0), style, color=colour, lw=1.8)
            for cell in cells:
                if cell["status"] != "finished" and cell["curve"]:
                    spent = end(cell, money)
                    axis.plot(spent, quality_at(cell, money, spent), "x", color=colour, ms=7, mew=2)
            if len(cells) > 1:
                axis.fill_between(costs, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0)
        if money in budgeted(record):
            axis.axvline(equal_cost(record, money), color="#888888", lw=0.8, ls=(0, (2, 3)))
        axis.set_xlabel(CURRENCIES[money] + (", s" if money.endswith("_s") else ""))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.grid(alpha=0.2)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean of the objectives")
    _legend(figure, record, names)
    return figure


def cost(record: dict[str, Any]) -> Figure | None:
    """Cost to reach the headline target and peak memory, in times GRPO's, with 95% intervals."""
    target, names = headline(record), [name for name in algorithms_of(record) if name != GRPO]
    if target is None or GRPO not in algorithms_of(record) or not names:
        return None
    columns: dict[str, Callable[[str], Comparison]] = {
        CURRENCIES[money]: partial(compare_costs, record, target, money)
        for money in ("wall_s", "generated_tokens", "training_flops", "reward_calls")
    }
    columns["peak memory"] = partial(compare_memory, record)
    figure, axes = plt.subplots(
        1, len(columns), figsize=(WIDTH, 1.3 + 0.34 * len(names)), sharey=True, layout="constrained"
    )
    for axis, (title, compare) in zip(axes, columns.items(), strict=True):
        found = {name: compare(name) for name in names}
        ends = [end for row in found.values() for end in (*row.estimate, *(row.interval or ()))]
        ends = [value for value in [1.0, *ends] if 0 < value < math.inf]
        low, high = min(ends) / 1.25, max(ends) * 1.6
        axis.set(xscale="log", xlim=(low, high))
        for row, (name, comparison) in enumerate(found.items()):
            _bar(axis, row, comparison, look(record, name)[0], high)
        axis.axvline(1.0, color=FAMILIES["grpo"][0], lw=1.2)
        axis.set_title(title, fontsize=9)
        _few_log_ticks(axis, low, high)
        axis.set_yticks(range(len(names)), [name_of(record, name) for name in names])
        axis.tick_params(axis="y", length=0)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(
        f"times GRPO's (line: GRPO), to reach {target.name}; →: at least, some seeds never reached it",
        fontsize=9,
    )
    return figure


def memory(record: dict[str, Any]) -> Figure | None:
    """Bytes by part, stacked."""
    sums = _stacks(record, lambda cell: (cell.get("memory") or {}).get("parts"), PARTS)
    if not sums:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 1.5 + 0.34 * len(sums)), layout="constrained")
    scaled = {name: [value / 2**20 for value in values] for name, values in sums.items()}
    _stacked(axis, record, scaled, PARTS, PART_COLOURS)
    axis.set_xlabel("MiB at the peak, average over seeds")
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False
    )
    return figure


def phases(record: dict[str, Any]) -> Figure | None:
    """Seconds and FLOPs of whole runs by phase, stacked."""
    seconds = _stacks(record, lambda cell: cell.get("phase_s"), PHASES)
    work = _stacks(record, lambda cell: cell.get("flops"), PHASES)
    if not seconds or not work:
        return None
    figure, axes = plt.subplots(
        1, 2, figsize=(WIDTH, 1.5 + 0.34 * len(seconds)), sharey=True, layout="constrained"
    )
    _stacked(axes[0], record, seconds, PHASES, PHASE_COLOURS)
    _stacked(axes[1], record, work, PHASES, PHASE_COLOURS)

    axes[0].set_xlabel("seconds of a whole run, average over seeds")
    axes[1].set_xlabel("FLOPs of a whole run, average over seeds")
    axes[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), frameon=False
    )
    return figure


def pareto(record: dict[str, Any]) -> Figure | None:
    """The fronts: points that no other beats are filled and joined."""
    found = {name: front for name, front in fronts(record).items() if front["points"]}
    if not found:
        return None
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 6.2), layout="constrained")
    for axis, front in zip(axes.flat, found.values(), strict=False):
        best = sorted((row["x"], row["y"]) for row in front["points"] if row["front"])
        axis.plot(*zip(*best, strict=True), color="#555555", lw=1.0, ls=":", zorder=1)
        for row in front["points"]:
            colour = look(record, row["algorithm"])[0]
            size, fill = (34, colour) if row["front"] else (20, "none")
            axis.scatter(row["x"], row["y"], s=size, color=fill, edgecolor=colour, linewidths=1.2, zorder=2)
        axis.set(xlabel=front["x"], ylabel="mean of the objectives" if front["y"] == "mean" else front["y"])
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.grid(alpha=0.2)
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    spare = list(axes.flat)[-1] if len(found) < axes.size else None
    _legend(spare or figure, record, algorithms_of(record), dots=True)
    return figure


def objectives(record: dict[str, Any]) -> Figure | None:
    """Every objective, the worst, over-refusal, diversity and KL after the wall-time budget: average, span of seeds."""
    names = algorithms_of(record)
    titles = {"over_refusal": "over-refusal (less is better)", "distinct": "diversity", "kl": "KL, nats"}
    columns = [*objectives_of(record), "worst", *titles]
    columns = [column for column in columns if measured(record, column)]
    if not names or not columns:
        return None
    across = min(4, len(columns))
    down = math.ceil(len(columns) / across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(WIDTH, down * (0.8 + 0.26 * len(names))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    budget = equal_cost(record, "wall_s")
    for axis, column in zip(axes.flat, columns, strict=False):
        for row, name in enumerate(names):
            values = [quality_at(cell, "wall_s", budget, column) for cell in cells_of(record, name).values()]
            colour = look(record, name)[0]
            axis.plot([min(values), max(values)], [row, row], color=colour, lw=3, alpha=0.35)
            axis.plot(fmean(values), row, "o", color=colour, ms=6)
        axis.set_title(titles.get(column, column.replace("_", " ")), fontsize=9)
        axis.set_yticks(range(len(names)), [name_of(record, name) for name in names])
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.tick_params(axis="y", length=0)
        axis.grid(alpha=0.2)
    for axis in list(axes.flat)[len(columns) :]:
        axis.axis("off")
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"after {budget:.0f} s of wall time: average over seeds, and their span", fontsize=9)
    return figure


PICTURES: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
    "quality": quality,
    "cost": cost,
    "memory": memory,
    "phases": phases,
    "pareto": pareto,
    "objectives": objectives,
}


def look(record: dict[str, Any], algorithm: str) -> tuple[str, str]:
    """(colour, line style): by family, and within a family by the order of the record."""
    family = record["algorithms"][algorithm]["family"]
    of_family = [name for name, about in record["algorithms"].items() if about["family"] == family]
    place = of_family.index(algorithm)
    tones = FAMILIES.get(family, ("#555555", "#999999"))
    return tones[place % len(tones)], STYLES[place % len(STYLES)]


def _bar(axis: Axes, row: int, comparison: Comparison, colour: str, edge: float) -> None:
    """From 1 to the average, with its interval; to the edge, with an arrow, where only a lower bound is known."""
    low, high = comparison.estimate
    if not comparison.known:
        axis.text(1.05, row, "?", va="center", color=colour)
        return
    value = low if low > 0 else high
    if abs(value - 1.0) < 0.02:  # a bar too short to be seen
        axis.plot(value, row, "D", color=colour, ms=5, zorder=3)
    axis.barh(row, value - 1.0, left=1.0, height=0.62, color=colour, alpha=0.85)
    ends = [end for end in comparison.interval or () if 0 < end < math.inf]
    if len(ends) == 2:
        axis.plot(ends, [row, row], color="black", lw=1.2)
    if not math.isfinite(high):
        axis.annotate(
            "", (edge, row), (value, row), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.4}
        )
    elif low == 0:
        axis.text(value, row, "≤ ", va="center", ha="right", color=colour)


def _few_log_ticks(axis: Axes, low: float, high: float) -> None:
    marks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    if high / low < 6:
        marks = [0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4]
    marks = [mark for mark in marks if low <= mark <= high]
    axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="x", alpha=0.2)


def _stacks(
    record: dict[str, Any], of: Callable[[dict[str, Any]], dict[str, float] | None], parts: Sequence[str]
) -> dict[str, list[float]]:
    """The average over seeds of each part, of every algorithm that has any."""
    found = {}
    for name in algorithms_of(record):
        rows = [row for cell in cells_of(record, name).values() if (row := of(cell))]
        if rows:
            found[name] = [fmean(row.get(part, 0) for row in rows) for part in parts]
    return found


def _stacked(
    axis: Axes,
    record: dict[str, Any],
    stacks: dict[str, list[float]],
    parts: Sequence[str],
    colours: Sequence[str],
) -> None:
    left = [0.0] * len(stacks)
    for i, (part, colour) in enumerate(zip(parts, colours, strict=True)):
        widths = [values[i] for values in stacks.values()]
        axis.barh(
            range(len(stacks)), widths, left=left, height=0.7, color=colour, label=part.replace("_", " ")
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(stacks)), [name_of(record, name) for name in stacks])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(stacks) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.2)


def _legend(
    place: Figure | Axes, record: dict[str, Any], names: Sequence[str], *, dots: bool = False
) -> None:
    handles = []
    for name in names:
        colour, style = look(record, name)
        line = Line2D([], [], color=colour, label=name_of(record, name), ls="" if dots else style, lw=2.2)
        line.set_marker("o" if dots else "")
        handles.append(line)
    if isinstance(place, Figure):
        place.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, handlelength=2.6)
    else:
        place.legend(handles=handles, loc="center", ncols=1, frameon=False)
