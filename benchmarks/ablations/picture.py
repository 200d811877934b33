"""The ablations as a picture: time of the step, and memory of the part, without each idea."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MIB = 2**20
KEPT, REMOVED = "#1f6f8b", "#e76f51"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Left, how many times as long the part and the whole step take without an idea; right, memory with and without."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $
    import matplotlib.pyplot as plt

    rows = [row for row in record["ablations"] if row["part"] != "advantages"][::-1]  # too short to be drawn
    places = range(len(rows))
    figure, (time_axis, memory_axis) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.55 * len(rows)), layout="constrained", sharey=True
    )
    for key, colour, shift, label in (
        ("time", REMOVED, 0.16, "its part of the step"),
        ("step", "#6c757d", -0.16, "the whole step"),
    ):
        values = [row[key] for row in rows]
        around = [
            [max(0.0, row[key] - row[f"{key}_ci95"][0]) for row in rows],
            [max(0.0, row[f"{key}_ci95"][1] - row[key]) for row in rows],
        ]
        heights = [place + shift for place in places]
        time_axis.errorbar(values, heights, xerr=around, fmt="o", color=colour, ms=5, lw=1.4, label=label)
        for row, value, height in zip(rows, values, heights, strict=True):
            time_axis.annotate(
                f"×{value:.2f}",
                (row[f"{key}_ci95"][1], height),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=colour,
            )
    time_axis.set_xscale("log")
    time_axis.xaxis.set_major_formatter("{x:g}")
    time_axis.xaxis.set_minor_formatter("{x:g}")
    time_axis.set_xlim(right=1.15 * time_axis.get_xlim()[1])
    time_axis.axvline(1.0, color="grey", linewidth=0.8)
    time_axis.set_yticks(list(places), [f"{row['idea']}\n→ {row['removed']}" for row in rows], fontsize=8)
    time_axis.set_xlabel("time without the idea / with it (95% interval)", fontsize=9)
    time_axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    for side, colour, shift, label in ((0, KEPT, 0.19, "with the idea"), (1, REMOVED, -0.19, "without it")):
        found = [row["memory"][side] or {"held_bytes": 0, "extra_bytes": 0} for row in rows]
        held = [one["held_bytes"] / MIB for one in found]
        extra = [one["extra_bytes"] / MIB for one in found]
        heights = [place + shift for place in places]
        memory_axis.barh(heights, held, 0.34, color=colour, alpha=0.45)
        memory_axis.barh(heights, extra, 0.34, left=held, color=colour, label=label)
        for height, total in zip(heights, map(sum, zip(held, extra, strict=True)), strict=True):
            memory_axis.text(total, height, f" {total:,.0f}", va="center", fontsize=7)
    memory_axis.set_xlabel("memory of the part, MiB (pale: models)", fontsize=9)
    memory_axis.set_xlim(right=1.1 * memory_axis.get_xlim()[1])
    memory_axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    figure.suptitle(f"One idea removed · {record['device']}, {threads}", fontsize=10)
    for axis in (time_axis, memory_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
