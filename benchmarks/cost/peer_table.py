"""What a record of `benchmarks.cost.peers` says: the verdict of each duel and the rows of its table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

COLUMNS = {
    "mean": "judge's mean",
    "worst": "worst objective",
    "over_refusal": "over-refusal",
    "kl": "KL, nats",
    "length": "tokens",
    "pair_accuracy": "pairs right",
    "pair_loss": "pair loss",
    "seconds": "seconds",
    "cpu_s": "of a core",
}
SAME = 0.01
"""Differences of the judge's mean within this are none: half a standard error of one evaluation."""
SIDES = {"start": "the start policy", "ours": "ours", "trl": "TRL"}


def verdict(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether ours reaches the peer: differences of the judge's mean, ours - theirs, seed by seed.

    `ci95` is Student's interval of the mean difference over the seeds. `says`: "level" where all of it is within
    `SAME`, else "above" or "below" where it leaves 0 out and "not told apart" where it does not; "one seed" where there
    is no interval; else the status of the side that has nothing to compare.
    """
    from scipy.stats import t as student  # slow to load, and a page needs it not

    both = [run for run in runs if all(run[side]["status"] == "finished" for side in ("ours", "trl"))]
    if not both:
        side = next(
            run[side] for side in ("trl", "ours") for run in runs if run[side]["status"] != "finished"
        )
        return {"says": side["status"], "why": side["why"]}
    differences = [run["ours"]["mean"] - run["trl"]["mean"] for run in both]
    found = {"difference": mean(differences), "seeds": len(both)}
    if len(both) < 2:
        return found | {"ci95": None, "says": "one seed"}
    half = float(student.ppf(0.975, len(both) - 1)) * stdev(differences) / math.sqrt(len(both))
    low, high = found["difference"] - half, found["difference"] + half
    says = "above" if low > 0 else "below" if high < 0 else "not told apart"
    if max(-low, high) < SAME:
        says = "level"
    return found | {"ci95": [low, high], "says": says}


def rows(record: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each side of each duel: its name, and means over the seeds under `COLUMNS` (None: not measured)."""
    found = []
    for name, duel in record["duels"].items():
        for side, title in SIDES.items():
            done = [run[side] for run in duel["runs"] if run[side].get("status", "finished") == "finished"]
            release = done[0].get("versions", {}).get("trl", "") if done else ""
            values = [[run[column] for run in done if column in run] for column in COLUMNS]
            cells = [mean(column) if column else None for column in values]
            found.append([f"{name.upper()}, {title} {release}".strip(), *cells])
    return found


def sentences(record: Mapping[str, Any]) -> list[str]:
    """The verdicts in words."""
    return [f"{name.upper()}: {_sentence(duel['verdict'])}" for name, duel in record["duels"].items()]


def table(record: Mapping[str, Any]) -> str:
    """Markdown: the rows, and the verdicts under them."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for title, *cells in rows(record):
        shown = ("–" if cell is None else f"{cell:.3f}" for cell in cells)
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *sentences(record)])


def _sentence(found: Mapping[str, Any]) -> str:
    if "difference" not in found:
        return f"{found['says']} ({found['why']})"
    interval = found["ci95"]
    shown = f", 95% [{interval[0]:+.3f}, {interval[1]:+.3f}] over {found['seeds']} seeds" if interval else ""
    return f"ours - TRL's {found['difference']:+.3f}{shown}: {found['says']}"
