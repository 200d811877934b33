"""The records of `benchmarks.step` as pictures: `python -m benchmarks.step.picture [FOLDER]`.

One PNG for every device: whole steps as bars, ours split into its phases, the peers' in one piece, a tick for each
sample; beside it, on a CPU, what was reached of what is wanted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.page import pages_of
from benchmarks.step.phases import PHASES

matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $

COLOURS = {
    "prefill": "#8ecae6",
    "decode": "#1f6f8b",
    "sampling": "#59a5c4",
    "scoring": "#b59ad6",
    "body": "#2a9d8f",
    "attention": "#8fcf9f",
    "head": "#e76f51",
    "optimizer": "#e9c46a",
    "other": "#6c757d",
}
PEER = "#b8b8b8"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 where the folder holds no record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1] / "results")
    folder = parser.parse_args(argv).folder
    devices: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("step-*.json")):
        record = json.loads(path.read_text())
        if record.get("benchmark") == "step" and bars_of(record):
            devices[record["device"]].append(record)
    if not devices:
        print(f"benchmarks.step.picture: no record of benchmarks.step in {folder}", file=sys.stderr)
        return 2
    for device, records in devices.items():
        path = folder / f"step-{'-'.join(device.lower().split())}.png"
        draw(records, device, path)
        print(path)
    pages_of(folder, "step")
    return 0


def bars_of(record: dict[str, Any]) -> list[tuple[str, dict[str, float], list[float]]]:
    """(name, seconds by phase or in one piece, samples) of every bar a record gives.

    Phases are measured with the clock on, and are drawn at the length of the step without it.
    """
    prefix = f"{record['case']}: " if "case" in record else ""
    bars = []
    for part, name in (("phases", "grpo_fast"), ("step", "step"), ("update", "update")):
        found = record.get(part, {})
        if "unwatched_s" not in found:
            continue
        whole = record.get("step", {}).get("median_s", {}).get(name, found["unwatched_s"])
        scale = whole / sum(found["median_s"].values())
        shares = {phase: scale * found["median_s"][phase] for phase in PHASES}
        bars.append((prefix + name, shares, record.get("step", {}).get("samples_s", {}).get(name, [])))
    for part in ("step", "trl"):
        found = record.get(part, {})
        for name, samples in found.get("samples_s", {}).items():
            if name != "grpo_fast":
                title = f"{prefix}TRL, {name}" if part == "trl" else prefix + name
                bars.append((title, {"peer": found["median_s"][name]}, samples))
    return bars


def draw(records: list[dict[str, Any]], device: str, path: Path) -> None:
    """All bars of one device, and the bars that its CPU record was held against."""
    bars = [bar for record in records for bar in bars_of(record)][::-1]
    wanted = next((record["bars"] for record in records if record.get("bars")), {})
    height = 2.1 + 0.42 * max(len(bars), len(wanted))
    figure, axes = plt.subplots(
        1, 2 if wanted else 1, figsize=(12 if wanted else 9, height), squeeze=False, layout="constrained"
    )
    figure.suptitle(
        f"One GRPO step, {device}, CPU threads: {records[0]['threads']}" if wanted else f"GRPO, {device}"
    )
    _steps(axes[0, 0], bars, "CPU seconds" if records[0].get("clock") == "cpu" else "seconds")
    if wanted:
        _reached(axes[0, 1], wanted)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _steps(axis: Axes, bars: list[tuple[str, dict[str, float], list[float]]], unit: str) -> None:
    named: set[str] = set()
    split = sum("peer" not in shares for _, shares, _ in bars)
    for row, (_, shares, samples) in enumerate(bars):
        left = 0.0
        for phase, value in shares.items():
            label = f"{phase} {value / sum(shares.values()):.0%}" if split == 1 else phase
            label = "_" if phase in named or phase == "peer" else label
            axis.barh(row, value, left=left, color=COLOURS.get(phase, PEER), label=label)
            named.add(phase)
            left += value
        axis.plot(samples, [row] * len(samples), "|", color="black", alpha=0.3, markersize=7)
        axis.text(max([left, *samples]), row, f"  {left:.2f} s", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axis.set_xlabel(f"{unit}, median; ticks: samples", fontsize=8)
    axis.set_xlim(right=1.15 * axis.get_xlim()[1])
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=5)


def _reached(axis: Axes, wanted: dict[str, dict[str, Any]]) -> None:
    names = list(wanted)[::-1]
    values = [wanted[name]["reached"] / wanted[name]["wanted"] for name in names]
    colours = ["#2a9d8f" if wanted[name]["met"] else "#e76f51" for name in names]
    axis.barh(names, values, color=colours)
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        axis.text(
            value,
            row,
            f"  {wanted[name]['reached']:.2f} of {wanted[name]['wanted']:g}",
            va="center",
            fontsize=8,
        )
    axis.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("reached / wanted", fontsize=8)
    axis.set_xlim(left=0, right=1.35 * max(1.0, *values))


if __name__ == "__main__":
    sys.exit(main())
