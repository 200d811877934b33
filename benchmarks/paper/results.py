"""From scores before and after to the record, the table and the picture.

95% intervals: of means and their paired changes ±1.96 standard errors, of rates Wilson's and of their paired changes
Agresti and Min's, which are not of width 0 where nothing was seen to happen. Letters: n prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.paper.completions import WHEN
from benchmarks.paper.rubrics import OBJECTIVES
from benchmarks.paper.sources import KINDS
from grpo_fast.evaluate import mean_with_interval

Scores = dict[str, dict[str, Tensor]]
"""{before, after: {name: n values, NaN where there is none}}."""


def wilson(values: Tensor) -> dict[str, Any]:
    """Share of ones among the finite values and its 95% interval (Wilson, 1927)."""
    values = values[~values.isnan()]
    n, z = len(values), 1.96
    if not n:
        return {"mean": math.nan, "ci95": [math.nan, math.nan]}
    p = values.mean().item()
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"mean": p, "ci95": [max(0.0, centre - half), min(1.0, centre + half)]}


def paired_rates(change: Tensor) -> dict[str, Any]:
    """Mean of paired changes (n of -1, 0, 1) and its 95% interval (Agresti and Min, 2005): half an observation is
    added to each of the four outcomes of a pair."""
    n = len(change) + 2
    gained, lost = ((change == sign).sum().item() + 0.5 for sign in (1, -1))
    centre = (gained - lost) / n
    half = 1.96 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return {"mean": change.mean().item(), "ci95": [max(-1.0, centre - half), min(1.0, centre + half)]}


def compared(scores: Scores, name: str, chosen: Tensor, *, rate: bool = False) -> dict[str, Any] | None:
    """Before, after and change of one name over the `chosen` prompts (n bool); None where nothing was scored."""
    interval, of_change = (wilson, paired_rates) if rate else (mean_with_interval, mean_with_interval)
    old, new = (scores[when][name][chosen] for when in WHEN)
    both = ~(old.isnan() | new.isnan())
    if not both.any():
        return None
    return {
        "before": interval(old[both]),
        "after": interval(new[both]),
        "change": of_change(new[both] - old[both]),
        "prompts": int(both.sum()),
        "missing": int((~both).sum()),
    }


def summarise(kinds: Sequence[str], sources: Sequence[str], reward: Scores, judged: Scores) -> dict[str, Any]:
    """The figures of the record: objectives by group of prompts, attack success, over-refusal."""
    of_kind = {kind: torch.tensor([k == kind for k in kinds]) for kind in KINDS}
    groups = {"all": torch.ones(len(kinds), dtype=torch.bool), **of_kind}
    objectives = {
        group: {
            name: {
                "reward_model": compared(reward, name, chosen),
                "judge": compared(judged, name, chosen),
            }
            for name in OBJECTIVES
        }
        for group, chosen in groups.items()
        if chosen.any()
    }
    return {
        "prompts": {group: int(chosen.sum()) for group, chosen in groups.items()},
        "objectives": objectives,
        "attack_success": _rates(judged, "attack_success", {"harmful": of_kind["harmful"]}, sources),
        "over_refusal": _rates(
            judged,
            "refusal",
            {
                "borderline and benign": of_kind["borderline"] | of_kind["benign"],
                "borderline": of_kind["borderline"],
                "benign": of_kind["benign"],
            },
            sources,
        ),
    }


def _rates(judged: Scores, name: str, groups: dict[str, Tensor], sources: Sequence[str]) -> dict[str, Any]:
    """Rates of the groups, and of each source within the first one."""
    whole = next(iter(groups.values()))
    split = {
        source: whole & torch.tensor([s == source for s in sources]) for source in dict.fromkeys(sources)
    }
    found = {group: compared(judged, name, chosen, rate=True) for group, chosen in (groups | split).items()}
    return {group: entry for group, entry in found.items() if entry is not None}


def table_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """(figure, prompts, by, before, after, change) of the lines that are shown."""
    rows = []
    for group in ("harmful", "all"):
        for name, by in record["objectives"].get(group, {}).items():
            for who, entry in (("reward model", by["reward_model"]), ("judge", by["judge"])):
                rows.append((name, f"{group}, {_count(entry)}", who, *_shown(entry, "{:.3f}")))
    for title, key in (("attack success", "attack_success"), ("over-refusal", "over_refusal")):
        for group, entry in record[key].items():
            rows.append((title, f"{group}, {_count(entry)}", "judge", *_shown(entry, "{:.1%}")))
    return rows


COLUMNS = ("", "prompts", "by", "before", "after", "change")


def print_table(record: dict[str, Any]) -> None:
    """Everything side by side, on the terminal."""
    table = Table(title=f"{record['model']}: before and after training", title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 3 else "right")
    last = ""
    for row in table_rows(record):
        if last and row[0] != last and row[0] in ("safety", "attack success"):
            table.add_section()
        table.add_row(*row)
        last = row[0]
    console = Console(soft_wrap=True)
    console.print(table)
    for line in record["notes"]:
        console.print(line, markup=False)


def draw(record: dict[str, Any], path: Path) -> None:
    """The objectives on attack prompts by both judges, and attack success beside over-refusal, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $
    import matplotlib.pyplot as plt

    colours = {"before": "#b8b8b8", "after": "#1f6f8b"}
    group = "harmful" if "harmful" in record["objectives"] else "all"
    objectives = record["objectives"][group]
    panels = [
        (f"{title}, {group} prompts", {name: objectives[name][key] for name in objectives})
        for title, key in (
            ("Reward model", "reward_model"),
            ("Independent judge" if record["independent"] else "Judge", "judge"),
        )
    ]
    rates = {"attack\nsuccess": record["attack_success"].get("harmful")}
    rates |= {f"over-refusal\n{name}": record["over_refusal"].get(name) for name in ("borderline", "benign")}
    panels.append(("Rates by the judge, lower is better", rates))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (title, entries) in zip(axes, panels, strict=True):
        entries = {name: entry for name, entry in entries.items() if entry}
        for offset, when in zip((-0.2, 0.2), WHEN, strict=True):
            for place, entry in enumerate(entries.values()):
                mean, (low, high) = entry[when]["mean"], entry[when]["ci95"]
                axis.bar(place + offset, mean, 0.38, color=colours[when], label=when if place == 0 else None)
                if math.isfinite(low):
                    axis.plot([place + offset] * 2, [low, high], color="black", linewidth=1)
        axis.set_xticks(range(len(entries)), list(entries), fontsize=8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{record['model']}, 95% intervals", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _count(entry: dict[str, Any] | None) -> str:
    return "none" if entry is None else f"{entry['prompts']:,}"


def _shown(entry: dict[str, Any] | None, form: str) -> tuple[str, str, str]:
    """before, after, change; each with its interval."""
    if entry is None:
        return "not measured", "not measured", "not measured"

    def one(value: dict[str, Any], sign: str = "") -> str:
        low, high = value["ci95"]
        text = form.replace(":", f":{sign}")
        bounds = f" [{text.format(low)}, {text.format(high)}]" if math.isfinite(low) else ""
        return text.format(value["mean"]) + bounds

    return one(entry["before"]), one(entry["after"]), one(entry["change"], "+")
