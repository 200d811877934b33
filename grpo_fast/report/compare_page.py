"""Several runs side by side: what was set otherwise, what came of it, and their curves in the same charts."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError
from grpo_fast.report.charts import Series, line_chart
from grpo_fast.report.template import is_number, page_template
from grpo_fast.run.follow import check_run_folder, standing
from grpo_fast.run.metrics import read_rows, read_summary
from grpo_fast.run.progress import PHASES
from grpo_fast.run.shapes import METRICS

UNTOLD = ("name", "output_dir")  # settings that differ between any two runs
CURVES = (
    ("kl", "KL divergence from the reference, a token"),
    ("entropy", "Entropy, nats a token"),
    ("length_mean", "Completion length, tokens"),
    ("flat_groups_frac", "Groups without signal"),
    ("grad_norm", "Gradient norm"),
    ("tokens_per_s", "Tokens a second"),
)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run's folder says."""

    name: str
    settings: Mapping[str, Any]
    """Dotted name -> value"""
    rows: list[dict[str, Any]]
    """Of the last phase"""
    summary: Mapping[str, Any]
    """Empty where the run has written none"""
    ended: str = ""
    """failed or stopped, where that is known of a run without a summary"""

    @property
    def status(self) -> str:
        """finished, interrupted, or how far a run without a summary has come."""
        steps = self.rows[-1]["step"] if self.rows else 0
        return str(self.summary.get("status") or f"{self.ended} at step {steps}".strip())

    @property
    def objectives(self) -> list[str]:
        logged = [
            key.removeprefix("reward/") for row in self.rows for key in row if key.startswith("reward/")
        ]
        return list(dict.fromkeys([*(self.summary.get("objectives") or {}), *logged]))


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """The runs in these folders; UserError for a folder that is none, and for one that is named twice."""
    runs: list[RunFiles] = []
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice: compare different ones")
    for folder in folders:
        config = folder / "config.toml"
        check_run_folder(folder)
        try:
            settings = _flat(tomllib.loads(config.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{config} is not valid TOML: {error}") from None
        rows = [row for row in read_rows(folder / "metrics.jsonl", METRICS) if row.get("phase") == PHASES[-1]]
        name = folder.name if folder.name not in {run.name for run in runs} else str(folder)
        how = standing(folder, patience_s=math.inf)
        runs.append(
            RunFiles(
                name=name,
                settings=settings,
                rows=rows,
                summary=read_summary(folder) or {},
                ended=how.state if how.over else "",
            )
        )
    return runs


def different_settings(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of every setting that is not the same in all; – where a run has none."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in UNTOLD)
    values = {name: [_text(run.settings.get(name)) for run in runs] for name in names}
    return [(name, found) for name, found in values.items() if len(set(found)) > 1]


def outcomes(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """(figure, its value in each run): how far, how fast, and what became of every objective on held-out prompts."""
    found = [
        ("status", [run.status for run in runs]),
        (
            "steps",
            [_text(run.summary.get("steps", run.rows[-1]["step"] if run.rows else None)) for run in runs],
        ),
        ("seconds", [_number(run.summary.get("wall_s"), "{:,.0f}") for run in runs]),
        ("tokens a second", [_number(run.summary.get("tokens_per_s"), "{:,.0f}") for run in runs]),
        ("peak memory, GiB", [_number(run.summary.get("peak_memory_gib"), "{:.2f}") for run in runs]),
    ]
    for name in dict.fromkeys(name for run in runs for name in run.objectives):
        for source in ("judge", "reward"):
            cells = [_change((run.summary.get("objectives") or {}).get(name), source) for run in runs]
            if any(cell != "–" for cell in cells):
                found.append((f"{name}, {source}", cells))
    refused = [_before_after(run.summary.get("over_refusal")) for run in runs]
    if any(cell != "–" for cell in refused):
        found.append(("over-refusal", refused))
    return found


def render(runs: Sequence[RunFiles]) -> str:
    """The page: what differs, what came of it, a chart for every reward and of how training went."""
    colours = [f"var(--c{i % 8})" for i in range(len(runs))]
    objectives = list(dict.fromkeys(name for run in runs for name in run.objectives))
    charts = (
        [(f"Reward: {name}", f"reward/{name}") for name in objectives]
        + [(f"Judge: {name}", f"eval/judge/{name}") for name in objectives]
        + [(title, key) for key, title in CURVES]
    )
    drawn = []
    for title, key in charts:
        lines = [_series(run, key, colour) for run, colour in zip(runs, colours, strict=True)]
        lines = [line for line in lines if len(line.x) > 1]
        if lines:
            drawn.append({"title": title, "svg": line_chart(lines, title)})
    return page_template("compare.html.jinja").render(
        runs=list(zip([run.name for run in runs], colours, strict=True)),
        settings=different_settings(runs),
        outcomes=outcomes(runs),
        charts=drawn,
    )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of a TOML table and those within it."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _series(run: RunFiles, key: str, colour: str) -> Series:
    points = [(row["step"], row[key]) for row in run.rows if is_number(row.get(key))]
    return Series(
        name=run.name,
        x=[step for step, _ in points],
        y=[value for _, value in points],
        colour=colour,
        marks=key.startswith("eval/"),
    )


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"


def _number(value: Any, form: str) -> str:
    return form.format(value) if is_number(value) else "–"


def _change(objective: Mapping[str, Any] | None, source: str) -> str:
    """`0.53 → 0.89 (+0.36 ± 0.05)`."""
    parts = [(objective or {}).get(f"{source}_{when}") for when in ("before", "after", "change")]
    if not all(isinstance(part, Mapping) and is_number(part.get("mean")) for part in parts):
        return "–"
    before, after, change = (part for part in parts if part is not None)
    half = (
        (change["ci95"][1] - change["ci95"][0]) / 2 if is_number((change.get("ci95") or [None])[0]) else None
    )
    spread = f" ± {half:.2f}" if half is not None else ""
    return f"{before['mean']:.2f} → {after['mean']:.2f} ({change['mean']:+.2f}{spread})"


def _before_after(measured: Mapping[str, Any] | None) -> str:
    ends = [(measured or {}).get(when) for when in ("before", "after")]
    if not all(isinstance(end, Mapping) and is_number(end.get("mean")) for end in ends):
        return "–"
    return " → ".join(f"{end['mean']:.2f}" for end in ends if end is not None)
