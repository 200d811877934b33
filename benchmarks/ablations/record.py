"""From measured contenders to the record: ratios with intervals, the whole step without an idea, lines to read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from benchmarks.ablations.ideas import ABLATIONS, STEP
from benchmarks.cost.curves import quality_at
from benchmarks.step.timing import ratio_interval
from benchmarks.tables import Table

MIB = 2**20
QUALITY = (
    ("advantage-modes", "an advantage a head (gdpo)", "gdpo", "scalarized"),
    ("cost-cpu", "an advantage a head (gdpo)", "grpo", "grpo_scalarized"),
    ("cost-cpu", "no reference model", "grpo_no_kl", "grpo"),
)
"""(committed record, idea, what has it, what lacks it): quality is not measured again here."""


def ablations(contenders: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What removing each idea does: `time` and `step` are how many times as long the part and the whole step take
    (with 95% intervals over the rounds), `flops` how many times the counted arithmetic, memory in bytes."""
    rows = []
    for ablation in ABLATIONS:
        kept, without = contenders[ablation.kept], contenders[ablation.without]
        part = ablation.kept.partition(",")[0]
        whole = [sum(found) for found in zip(*(contenders[n]["samples_s"] for n in STEP), strict=True)]
        # Where the idea is judged by a part that is itself not the step's own, its cost is the difference of the two.
        change = [b - a for a, b in zip(kept["samples_s"], without["samples_s"], strict=True)]
        longer = [total + more for total, more in zip(whole, change, strict=True)]
        time, *time_ends = ratio_interval(without["samples_s"], kept["samples_s"], paired=True)
        step, *step_ends = ratio_interval(longer, whole, paired=True)
        flops = [row["counted"].get("matrix_flops") for row in (kept, without)]
        rows.append(
            {
                "idea": ablation.idea,
                "removed": ablation.removed,
                "part": part,
                "kept": ablation.kept,
                "without": ablation.without,
                "time": time,
                "time_ci95": time_ends,
                "step": step,
                "step_ci95": step_ends,
                "flops": flops[1] / flops[0] if all(flops) else None,
                "memory": [_memory(row) for row in (kept, without)],
            }
        )
    return rows


def _memory(row: Mapping[str, Any]) -> dict[str, float] | None:
    found = row.get("memory", {})
    return {key: found[key] for key in ("held_bytes", "extra_bytes")} if found.get("samples") else None


def quality(folder: Path) -> list[dict[str, Any]]:
    """What the committed records say of the ideas that can change quality: the judge's gains with the idea less those
    without it, by seed, of the mean of the objectives and of the worst one."""
    rows = []
    for name, idea, kept, without in QUALITY:
        path = folder / f"{name}.json"
        if not path.is_file():
            rows.append({"idea": idea, "record": name, "missing": f"no {name}.json there yet"})
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        gains = _gains_of_variants(record) if "runs" in record else _gains_of_cells(record)
        seeds = sorted(gains.get(kept, {}).keys() & gains.get(without, {}).keys())
        if not seeds:
            rows.append({"idea": idea, "record": name, "missing": f"no seed with {kept} and {without}"})
            continue
        row = {"idea": idea, "record": name, "commit": record.get("commit"), "kept": kept, "without": without}
        for k, measure in enumerate(("mean", "worst")):
            differences = [gains[kept][seed][k] - gains[without][seed][k] for seed in seeds]
            row[measure] = {"by_seed": differences, "mean": statistics.mean(differences)}
            row[measure]["ci95"] = _interval(differences)
        rows.append(row | {"seeds": seeds})
    return rows


def _gains_of_variants(record: Mapping[str, Any]) -> dict[str, dict[int, tuple[float, float]]]:
    gains: dict[str, dict[int, tuple[float, float]]] = {}
    for run in record["runs"]:
        ends = zip(run["judged"][0], run["judged"][-1], strict=True)
        found = [after - before for before, after in ends]
        gains.setdefault(run["variant"], {})[run["seed"]] = (statistics.mean(found), min(found))
    return gains


def _gains_of_cells(record: Mapping[str, Any]) -> dict[str, dict[int, tuple[float, float]]]:
    """After the same wall time; a run that broke off counts with what it had reached."""
    gains: dict[str, dict[int, tuple[float, float]]] = {}
    for cell in record["cells"]:
        if cell["curve"]:
            start, spent = cell["curve"][0]["judge"], record["budget"]["wall_s"]
            found = [quality_at(cell, "wall_s", spent, name) - start[name] for name in start]
            gains.setdefault(cell["algorithm"], {})[cell["seed"]] = (statistics.mean(found), min(found))
    return gains


def _interval(values: Sequence[float]) -> list[float]:
    """95% bootstrap interval of the mean."""
    draw = numpy.random.default_rng(0)
    found = numpy.asarray(values)[draw.integers(len(values), size=(2000, len(values)))].mean(axis=1)
    return [float(end) for end in numpy.quantile(found, (0.025, 0.975))]


def tables(record: Mapping[str, Any]) -> list[Table]:
    """The record as tables: what each idea saves, what each contender took, what is known of quality."""
    rows = []
    for row in record["ablations"]:
        with_idea, without = row["memory"]
        rows.append(
            [
                row["idea"],
                row["removed"],
                f"×{row['time']:.2f}",
                _ends(row["time_ci95"]),
                f"×{row['step']:.2f}",
                _ends(row["step_ci95"]),
                f"×{row['flops']:.2f}" if row["flops"] else None,
                _mib(with_idea),
                _mib(without),
            ]
        )
    head = ["idea", "removed", "part takes", "95%", "step takes", "95%", "FLOPs", "MiB with", "MiB without"]
    note = (
        "How many times as long the part of the step, and the whole step, takes without the idea. MiB: what the part "
        "holds (models) + the most it needs on top."
    )
    found = [Table(title="What removing an idea costs", head=head, rows=rows, note=note)]
    rows = []
    for name, row in record["contenders"].items():
        counted = row["counted"]
        flops = counted.get("matrix_flops")
        rows.append(
            [
                name,
                1000 * row["median_s"],
                _mib(_memory(row)),
                counted.get("sequences"),
                counted.get("positions"),
                counted.get("head_tokens"),
                flops and flops / 1e9,
            ]
        )
    head = ["", "median, ms", "MiB", "sequences", "positions", "head tokens", "GFLOP"]
    found.append(Table(title="Every contender", head=head, rows=rows))
    work = record["work"]
    rows = [
        ["prompts × completions", f"{work['prompts']} × {work['group']}"],
        [
            "prompt tokens",
            f"{work['prompt_tokens_all']:,}, {' to '.join(map(str, work['prompt_tokens']))} each",
        ],
        ["completion tokens", f"{work['completion_tokens_all']:,}, log-normal, {work['longest']} at most"],
        ["completions without signal", work["without_signal"]],
        ["generation", f"{work['new_tokens']} tokens a completion"],
        ["model", ", ".join(f"{name} {value}" for name, value in work["shape"].items())],
    ]
    found.append(Table(title="The step", head=["", ""], rows=rows))
    rows = []
    for row in record["quality"]:
        if "missing" in row:
            rows.append([row["idea"], f"{row['record']}: {row['missing']}", None, None, None, None, None])
            continue
        said = [f"{row['kept']} − {row['without']}, {row['record']}", len(row["seeds"])]
        ends = [
            text
            for measure in ("mean", "worst")
            for text in (f"{row[measure]['mean']:+.3f}", _ends(row[measure]["ci95"], "+.3f"))
        ]
        rows.append([row["idea"], *said, *ends])
    head = [
        "idea",
        "difference of the judge's gains",
        "seeds",
        "mean of all",
        "95%",
        "worst objective",
        "95%",
    ]
    note = "From committed records; the other ideas compute the same gradients and cannot change quality."
    found.append(Table(title="Quality, where an idea can change it", head=head, rows=rows, note=note))
    return found


def _ends(ends: Sequence[float], form: str = ".2f") -> str:
    return " to ".join(format(end, form) for end in ends)


def _mib(found: Mapping[str, float] | None) -> str | None:
    return f"{found['held_bytes'] / MIB:.0f} + {found['extra_bytes'] / MIB:.0f}" if found else None
