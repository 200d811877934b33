"""A record as tables, for the terminal, for Markdown and for report.html."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.cost.analysis import (
    GRPO,
    Target,
    algorithms_of,
    budgeted,
    cells_of,
    compare_costs,
    compare_memory,
    compare_qualities,
    equal_cost,
    headline,
    measured,
    name_of,
    objectives_of,
    targets,
)
from benchmarks.cost.curves import CURRENCIES, cost_to_reach, quality_at
from benchmarks.cost.terms import warnings
from benchmarks.cost.verdicts import (
    COSTS,
    choices,
    difference_text,
    ratio_text,
    reached_by,
    verdicts,
)
from benchmarks.tables import Table, cell

PHASES = ("generate", "reward", "reference", "values", "update")
PARTS = ("policy", "reference", "value_model", "reward_model", "optimizer", "gradients", "working")


def tables(record: dict[str, Any]) -> list[Table]:
    """Every table of a record that has something to show."""
    makers: Sequence[Callable[[dict[str, Any]], Table | None]] = (
        choice_table,
        cost_table,
        quality_table,
        difference_table,
        target_table,
        phase_table,
        memory_table,
        search_table,
    )
    return [table for make in makers if (table := make(record)) is not None]


def choice_table(record: dict[str, Any]) -> Table | None:
    """What to take, by what counts."""
    rows = choices(record)
    head = ("what counts", "least cost or best", "not told from it by these seeds")
    return Table(title="By what counts", head=head, rows=tuple(rows)) if rows else None


def cost_table(record: dict[str, Any]) -> Table | None:
    """Costs to reach the headline target: GRPO's in numbers, the others' in times GRPO's."""
    target = headline(record)
    if target is None or GRPO not in algorithms_of(record):
        return None
    rows = []
    for name in algorithms_of(record):
        cells = cells_of(record, name)
        if name == GRPO:
            texts = [_typical(record, target, money) for money in COSTS]
            texts.append(_bytes(_mean_peak(record, name)))
        else:
            texts = [ratio_text(compare_costs(record, target, money, name)) for money in COSTS]
            texts.append(ratio_text(compare_memory(record, name)))
        reached = f"{reached_by(record, name, target)} of {len(cells)}"
        rows.append((name_of(record, name), *texts, reached))
    head = ("algorithm", *(CURRENCIES[money] for money in COSTS), "peak memory", "seeds that reached it")
    title = f"To reach {target.name} (GRPO's costs; the others' in times GRPO's, 95% interval)"
    return Table(title=title, head=head, rows=tuple(rows))


def quality_table(record: dict[str, Any]) -> Table | None:
    """Qualities of every algorithm after the wall-time budget."""
    objectives = objectives_of(record)
    columns = ("mean", "worst", *objectives, "over_refusal", "distinct", "kl", "length")
    columns = [column for column in columns if measured(record, column)]
    cost = equal_cost(record, "wall_s")
    rows = []
    broken = False
    for name in algorithms_of(record):
        cells = cells_of(record, name).values()
        ended = sum(cell["status"] != "finished" for cell in cells)
        broken = broken or bool(ended)
        rows.append(
            (
                name_of(record, name) + (f" † {ended}" if ended else ""),
                *(
                    _spread([quality_at(cell, "wall_s", cost, column) for cell in cells])
                    for column in columns
                ),
            )
        )
    names = {"distinct": "diversity", "over_refusal": "over-refusal", "kl": "KL, nats"}
    head = ("algorithm", *(names.get(column, column) for column in columns))
    title = f"After {cost:.0f} s (mean ± standard deviation over seeds)"
    note = "† runs that diverged or failed count with their last evaluation before that." if broken else ""
    return Table(title=title, head=head, rows=tuple(rows), note=note) if rows else None


def difference_table(record: dict[str, Any]) -> Table | None:
    """Mean and worst objective (and over-refusal) against GRPO's at equal cost in each budgeted currency."""
    others = [name for name in algorithms_of(record) if name != GRPO]
    if GRPO not in algorithms_of(record) or not others:
        return None
    columns = [(quality, money) for quality in ("mean", "worst") for money in budgeted(record)]
    columns += [("over_refusal", "wall_s")] if measured(record, "over_refusal") else []
    rows = tuple(
        (
            name_of(record, name),
            *(difference_text(compare_qualities(record, money, quality, name)) for quality, money in columns),
        )
        for name in others
    )
    head = (
        "algorithm",
        *(f"{quality.replace('_', '-')}, equal {CURRENCIES[money]}" for quality, money in columns),
    )
    title = "Quality at equal cost, less GRPO's (95% interval)"
    return Table(title=title, head=head, rows=rows)


def target_table(record: dict[str, Any]) -> Table | None:
    """Wall time to every target."""
    wanted = targets(record)
    if not wanted:
        return None
    rows = []
    for name in algorithms_of(record):
        cells = list(cells_of(record, name).values())
        texts = []
        for target in wanted:
            costs = [cost_to_reach(cell, "wall_s", target.level, target.quality) for cell in cells]
            got = sorted(cost for cost in costs if math.isfinite(cost))
            span = f"{got[0]:.0f} to {got[-1]:.0f} s" if len(got) > 1 else "".join(f"{c:.0f} s" for c in got)
            texts.append(
                span if len(got) == len(cells) else f"{span or 'never'} ({len(got)} of {len(cells)})"
            )
        rows.append((name_of(record, name), *texts))
    head = ("algorithm", *(target.name for target in wanted))
    return Table(
        title="Wall time to each target (in brackets: seeds that reached it, where not all did)",
        head=head,
        rows=tuple(rows),
    )


def phase_table(record: dict[str, Any]) -> Table | None:
    """Seconds and FLOPs of a run by phase, averages over seeds, as shares of the whole."""
    rows = []
    for name in algorithms_of(record):
        cells = [
            cell for cell in cells_of(record, name).values() if cell.get("phase_s") and cell.get("flops")
        ]
        if not cells:
            continue
        texts = []
        for field in ("phase_s", "flops"):
            sums = {phase: fmean(cell[field].get(phase, 0) for cell in cells) for phase in PHASES}
            whole = sum(sums.values())
            texts += [f"{sums[phase] / whole:.0%}" if sums[phase] else "–" for phase in PHASES]
            texts.append(f"{whole:.0f} s" if field == "phase_s" else f"{number(whole)}")
        rows.append((name_of(record, name), *texts))
    head = ("algorithm", *(f"{kind}: {part}" for kind in ("time", "FLOPs") for part in (*PHASES, "all")))
    return Table(title="Where a run's time and FLOPs go", head=head, rows=tuple(rows)) if rows else None


def memory_table(record: dict[str, Any]) -> Table | None:
    """Bytes by part and the peak, averages over seeds."""
    rows = []
    for name in algorithms_of(record):
        cells = [cell for cell in cells_of(record, name).values() if (cell.get("memory") or {}).get("parts")]
        if not cells:
            continue
        parts = [fmean(cell["memory"]["parts"].get(part, 0) for cell in cells) for part in PARTS]
        texts = [_bytes(value) if value else "–" for value in parts]
        rows.append((name_of(record, name), *texts, _bytes(_mean_peak(record, name))))
    head = ("algorithm", *(part.replace("_", " ") for part in PARTS), "peak")
    return Table(title="Memory by part", head=head, rows=tuple(rows)) if rows else None


def search_table(record: dict[str, Any]) -> Table | None:
    """The hyper-parameter search: every setting an algorithm was tried with, its score, and what was chosen."""
    rows = []
    for name, about in record["algorithms"].items():
        tries = [row for row in record.get("search") or [] if row["algorithm"] == name]
        if not tries:
            continue
        varied = [
            key for key in tries[0]["settings"] if len({str(row["settings"].get(key)) for row in tries}) > 1
        ]
        tried = "; ".join(f"{_settings(row['settings'], varied)}: {_reached(row)}" for row in tries)
        rows.append((name_of(record, name), about["title"], tried, _settings(about["settings"], varied)))
    head = ("algorithm", "what it is", "tried: reward model's score", "chosen")
    return Table(title="Hyper-parameter search", head=head, rows=tuple(rows)) if rows else None


def _settings(settings: dict[str, Any], varied: Sequence[str]) -> str:
    """The settings that were varied; all of them where none was."""
    return ", ".join(f"{key} {settings.get(key)}" for key in (varied or settings)) or "–"


def _reached(row: dict[str, Any]) -> str:
    if row["status"] != "finished" or row["quality"] is None:
        return row["status"]
    return f"{row['quality']:.3f}"


def markdown(table: Table) -> str:
    """A table in Markdown, its title in a line of its own above it."""
    lines = [f"**{table.title}**", "", *([table.note, ""] if table.note else [])]
    lines += [_row(table.head), _row(["---"] * len(table.head))]
    return "\n".join([*lines, *(_row(row) for row in table.rows)])


def terminal(record: dict[str, Any], *, wide: bool = False) -> Any:
    """Warnings, the tables for the terminal (all of them with `wide`) and the sentences, to be printed by rich."""
    shown = tables(record) if wide else [choice_table(record), cost_table(record), quality_table(record)]
    from rich.console import Group  # here and not above: the page and report.html do without
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[Any] = [Text(f"! {line}", style="yellow") for line in warnings(record)]
    for table in shown:
        if table is None:
            continue
        drawn = RichTable(title=table.title, title_justify="left", box=None, header_style="bold")
        for i, name in enumerate(table.head):
            drawn.add_column(name, justify="left" if i == 0 else "right")
        for row in table.rows:
            drawn.add_row(*(Text(cell(value)) for value in row))
        parts += [Text(), drawn]
    return Group(*parts, Text(), *(Text(f"- {line}") for line in verdicts(record)))


def _row(values: Sequence[Any]) -> str:
    return f"| {' | '.join(cell(value).replace('|', '/') for value in values)} |"


def _typical(record: dict[str, Any], target: Target, money: str) -> str:
    costs = [
        cost_to_reach(cell, money, target.level, target.quality) for cell in cells_of(record, GRPO).values()
    ]
    if not all(math.isfinite(cost) for cost in costs):
        return "not by all seeds"
    value = math.exp(fmean(math.log(cost) for cost in costs)) if min(costs) > 0 else fmean(costs)
    return f"{value:.1f} s" if money.endswith("_s") else number(value)


def _mean_peak(record: dict[str, Any], name: str) -> float:
    peaks = [(cell.get("memory") or {}).get("peak") for cell in cells_of(record, name).values()]
    return fmean(float(peak) if peak else math.nan for peak in peaks)


def _spread(values: Sequence[float]) -> str:
    if any(math.isnan(value) for value in values):
        return "–"
    digits = 3 if abs(fmean(values)) < 2 else 1
    text = f"{fmean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def number(value: float) -> str:
    """Three digits and a power of ten in words of the field: k, M, G, T, P."""
    for power, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value / 2**20:,.1f} MiB" if value >= 2**20 / 10 else f"{value / 2**10:.1f} KiB"
