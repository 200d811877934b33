"""The measured figures as pictures and as a table: `python -m benchmarks.figures`.

Reads every JSON file that `benchmarks.loss_head` wrote into the folder, draws one PNG a device and dtype (time against
the bare products, extra memory against eager), and prints the table as Markdown.
"""

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

from benchmarks.page import pages_of

matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $

OURS = ("torch", "triton", "fused")
COLOURS = {"torch": "#1f6f8b", "triton": "#1f6f8b", "fused": "#2a9d8f", "products": "#b8b8b8"}
MODES = {"trained": "trained head", "frozen": "frozen head", "forward": "forward only"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 where the folder holds no record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "results")
    folder = parser.parse_args(argv).folder
    records = load(folder)
    if not records:
        print(f"benchmarks.figures: no record of benchmarks.loss_head in {folder}", file=sys.stderr)
        return 2
    print(table(records))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["device"], record["dtype"]].append(record)
    for (device, dtype), group in groups.items():
        path = folder / f"loss-head-{'-'.join(device.lower().split())}-{dtype}.png"
        draw(group, f"Loss head, {dtype}, {device}", path)
        print(f"\n{path}", file=sys.stderr)
    pages_of(folder, "loss_head")
    return 0


def load(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, ordered by device, shape and mode."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    records = [record for record in found if record.get("benchmark") == "loss_head"]
    return sorted(records, key=lambda r: (r["device"], r["shape"], list(MODES).index(r["mode"])))


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown row for each contender of each record."""
    lines = [
        "| device, dtype | N, H, V | gradients | contender | time | of products | TFLOP/s | extra memory | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        base = record["median_s"].get("products")
        for name, seconds in record["median_s"].items():
            ratio = f"{seconds / base:.2f}" if base else "–"
            errors = record["contenders"][name]["errors"]
            cells = [
                f"{record['device']}, {record['dtype']}",
                ", ".join(f"{n:,}" for n in record["shape"]),
                MODES[record["mode"]],
                name,
                f"{1000 * seconds:,.1f} ms",
                ratio,
                f"{record['tflops'][name]:.3g}",
                f"{record['extra_mib'][name]:,.0f} MiB",
                f"{max(errors):.0e}" if errors else "–",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Two panels a record: median time against the products, with all samples, and extra memory."""
    figure, axes = plt.subplots(
        len(records), 2, figsize=(9, 0.7 + 2.0 * len(records)), squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for (time_axis, memory_axis), record in zip(axes, records, strict=True):
        names = list(record["median_s"])[::-1]
        base = record["median_s"].get("products") or min(record["median_s"].values())
        colours = [COLOURS.get(name, "#e09f3e") for name in names]
        medians = [record["median_s"][name] / base for name in names]
        time_axis.barh(names, medians, color=colours)
        for row, name in enumerate(names):
            samples = [s / base for s in record["contenders"][name]["samples_s"]]
            time_axis.plot(samples, [row] * len(samples), "|", color="black", alpha=0.3, markersize=7)
            time_axis.text(max(samples), row, f"  {medians[row]:.2f}", va="center", fontsize=8)
        time_axis.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
        shape = ", ".join(f"{letter} {n:,}" for letter, n in zip("NHV", record["shape"], strict=True))
        time_axis.set_title(f"{MODES[record['mode']]} · {shape}", fontsize=9, loc="left")
        time_axis.set_xlabel("time / bare products", fontsize=8)
        memory = [record["extra_mib"][name] for name in names]
        memory_axis.barh(names, memory, color=colours)
        for row, value in enumerate(memory):
            memory_axis.text(value, row, f" {value:,.0f}", va="center", fontsize=8)
        memory_axis.set_xlabel("extra memory, MiB", fontsize=8)
        for axis in (time_axis, memory_axis):
            axis.set_xlim(right=1.18 * axis.get_xlim()[1])
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
