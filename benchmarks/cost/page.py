"""The page of what alignment costs: `python -m benchmarks.cost.page` draws and writes it anew from the records.

It reads the JSON files in benchmarks/results/, redraws their pictures there, and replaces what stands between the
markers `<!-- begin: NAME -->` and `<!-- end: NAME -->` of docs/cost.md. Everything outside of them is written by hand;
every measured figure stands inside. A record that is not there yet is said to be not measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost import tables
from benchmarks.cost.analysis import budgeted, fronts, name_of
from benchmarks.cost.curves import CURRENCIES
from benchmarks.cost.terms import check_equal_terms, mixed, mixture, short, warnings
from benchmarks.cost.verdicts import on_figures, verdicts
from benchmarks.page import Picture, read_record, write_page
from benchmarks.page_tables import shown
from benchmarks.tables import Table
from grpo_fast.errors import UserError
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "cost.md"
RECORDS = {
    "cost-cpu": "python -m benchmarks.cost",
    "cost-quick-cpu": "python -m benchmarks.cost --quick",
    "cost-model-cpu": "python -m benchmarks.cost.model --check --output benchmarks/results/cost-model-cpu.json",
    "cost-steps-cuda": "python -m benchmarks.cost.steps",
    "cost-sizes": "python -m benchmarks.cost.model --output benchmarks/results/cost-sizes.json",
    "cost-peers-cpu": "python -m benchmarks.cost.peers --dpo-python DPO/bin/python --ppo-python PPO/bin/python",
    "ablations-cpu": "python -m benchmarks.ablations --threads 1 --clock cpu --repeats 7 "
    "--output benchmarks/results/ablations-cpu.json",
}
"""Names of the records, without .json, and the commands that make them."""
TITLES = {
    "quality": "Mean quality against every currency. A cross is where a run diverged or failed; dotted is the budget",
    "cost": "Cost to reach the target, in times GRPO's",
    "memory": "Memory by part",
    "phases": "Time and FLOPs by phase",
    "pareto": "Fronts: filled points are beaten by no other",
    "objectives": "Every objective, over-refusal, diversity and KL after the same wall time",
}
MARKED = re.compile(r"(<!-- begin: ([\w-]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
Records = Mapping[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Redraw the pictures and rewrite the page."""
    parser = Parser(prog="python -m benchmarks.cost.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file with the markers")
    args = parser.parse_args(argv)
    records = read_records(args.results)
    for stem in ("cost-cpu", "cost-quick-cpu"):
        if stem in records:
            from benchmarks.cost.pictures import draw

            for path in draw(records[stem], args.results, stem):
                print(path)
    write_atomically(args.page, rewritten(args.page.read_text(encoding="utf-8"), records))
    print(args.page)
    return 0


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records that are there, by name; those of the comparison only where its terms were equal."""
    found = {stem: read_record(path) for stem in RECORDS if (path := folder / f"{stem}.json").is_file()}
    for record in found.values():
        if record["benchmark"] == "cost":
            check_equal_terms(record)
    return found


def rewritten(text: str, records: Records) -> str:
    """The page with every marked block written anew; UserError for a block that nobody writes."""

    def block(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in BLOCKS:
            raise UserError(f"docs/cost.md: no block is called {name}; known: {', '.join(BLOCKS)}")
        return f"{begin}{BLOCKS[name](records).strip()}\n{end}"

    return MARKED.sub(block, text)


def report(record: dict[str, Any], folder: Path, source: Path | None = None) -> Path:
    """Write FOLDER/report.html of a record, with its pictures beside it; the path of the page."""
    from benchmarks.cost.pictures import draw

    check_equal_terms(record)
    pictures = [
        Picture(path=path, caption=TITLES[path.stem.removeprefix("cost-")])
        for path in draw(record, folder, "cost")
    ]
    return write_page(
        folder / "report.html",
        title="What alignment costs",
        what="GRPO, PPO and DPO from the same start policies, on the same prompts, against the same reward models, "
        "judged on the same held-out prompts; comparisons are paired by seed.",
        record=record,
        tables=tables.tables(record),
        pictures=pictures,
        notes=[*warnings(record), *verdicts(record)],
        source=source,
    )


def _answer(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        said = [f"> **{line}**" for line in mixed(record)]
        return "\n\n".join([*said, _table(tables.choice_table(record)), _bullets(on_figures(record))])

    notes = mixture(list(records.values()))
    return "\n\n".join([*(f"> **{note}**" for note in notes), _of(records, "cost-cpu", text)])


def _terms(records: Records) -> str:
    return _of(records, "cost-cpu", _provenance)


def _costs(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        parts = [_table(tables.cost_table(record)), _picture("cost"), _picture("quality")]
        return "\n\n".join([*parts, _table(tables.target_table(record))])

    return _of(records, "cost-cpu", text)


def _qualities(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        found = [_table(tables.quality_table(record)), _picture("objectives")]
        return "\n\n".join([*found, _table(tables.difference_table(record))])

    return _of(records, "cost-cpu", text)


def _parts(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        found = [_table(tables.memory_table(record)), _picture("memory")]
        return "\n\n".join([*found, _table(tables.phase_table(record)), _picture("phases")])

    return _of(records, "cost-cpu", text)


def _fronts(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        lines = []
        for front in fronts(record).values():
            names = dict.fromkeys(
                name_of(record, row["algorithm"]) for row in front["points"] if row["front"]
            )
            if names:
                lines.append(f"{front['y']} against {front['x']}: {', '.join(names)}.")
        return "\n\n".join([_picture("pareto"), _bullets(lines)])

    return _of(records, "cost-cpu", text)


def _search(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        table = tables.search_table(record)
        if table is None:
            return (
                f"There was no search: settings are {record.get('settings_source', 'as they are written')}."
            )
        seeds = sorted({row["seed"] for row in record["search"]})
        again = sorted(set(seeds) & {cell["seed"] for cell in record["cells"]})
        said = f"Tried with seed{'s' if len(seeds) != 1 else ''} {', '.join(map(str, seeds))}"
        said += (
            f"; {', '.join(map(str, again))} also compared." if again else ", which is compared no further."
        )
        return "\n\n".join([_table(table), said])

    return _of(records, "cost-cpu", text)


def _quick(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        return "\n\n".join([_provenance(record), _table(tables.cost_table(record))])

    return _of(records, "cost-quick-cpu", text)


def _ablations(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        from benchmarks.ablations import record as made

        rows = [_table(table) for table in made.tables(record)]
        picture = "![What removing an idea costs](../benchmarks/results/ablations-cpu.png)"
        return "\n\n".join([_origin(record), rows[0], picture, *rows[1:]])

    return _of(records, "ablations-cpu", text)


def _other(stem: str) -> Callable[[Records], str]:
    """A block for the record of another benchmark: where it comes from, its tables, its limits."""

    def text(record: dict[str, Any]) -> str:
        _, what, found, notes = shown(record)
        rows = [_table(table) for table in found]
        return "\n\n".join([what, _origin(record), *rows, *([_bullets(notes)] if notes else [])])

    return lambda records: _of(records, stem, text)


def _sizes(records: Records) -> str:
    def text(record: dict[str, Any]) -> str:
        _, what, found, notes = shown(record)
        rates = f"Rates: {record['rates']}{' (**assumed, not measured**)' if record['assumed'] else ''}."
        return "\n\n".join([what, rates, *map(_table, found), _bullets(notes)])

    return _of(records, "cost-sizes", text)


def _of(records: Records, stem: str, text: Callable[[dict[str, Any]], str]) -> str:
    """The text of a record, or that there is none yet."""
    if stem not in records:
        return f"*Not measured yet: `{RECORDS[stem]}` writes `benchmarks/results/{stem}.json`.*"
    return text(records[stem])


def _provenance(record: dict[str, Any]) -> str:
    """Warnings, and what was run on what."""
    seeds = sorted({cell["seed"] for cell in record["cells"]})
    budget, work = record["budget"], record["work"]
    lines = [f"> **{line}**" for line in warnings(record)]
    lines.append(_origin(record))
    shares = [f"{budget['wall_s']:.0f} s of wall time"] if budget.get("wall_s") else []
    shares += [
        f"{tables.number(budget[money])} {CURRENCIES[money]}"
        for money in budgeted(record)
        if money != "wall_s"
    ]
    said = [f"{key.replace('_', ' ')} {_amount(value)}" for key, value in work.items()]
    lines.append(
        f"{len(record['algorithms'])} algorithms, seeds {', '.join(map(str, seeds))}, {record['jobs']} "
        f"run{'s' if record['jobs'] != 1 else ''} at a time, {record['wall_s'] / 60:.0f} minutes in all. Budget of a "
        f"run: {', '.join(shares)}. "
        f"Work: {', '.join(said)}."
    )
    return "\n\n".join(lines)


def _origin(record: dict[str, Any]) -> str:
    parts = [str(record["device"])] if "device" in record else []
    if "threads" in record:
        parts.append(f"{record['threads']} thread{'s' if record['threads'] != 1 else ''}")
    parts += [f"{name} {version}" for name, version in (record.get("versions") or {}).items()]
    parts += [f"commit {short(record['commit'])}"] if "commit" in record else []
    return f"Measured on: {', '.join(parts)}."


def _amount(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _picture(name: str) -> str:
    return f"![{TITLES[name]}](../benchmarks/results/cost-cpu-{name}.png)"


def _table(table: Table | None) -> str:
    return tables.markdown(table) if table is not None else "*No algorithm gained anything: nothing to show.*"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line[:1].upper()}{line[1:]}" for line in lines)


BLOCKS: dict[str, Callable[[Records], str]] = {
    "answer": _answer,
    "terms": _terms,
    "costs": _costs,
    "qualities": _qualities,
    "parts": _parts,
    "fronts": _fronts,
    "search": _search,
    "quick": _quick,
    "model": _other("cost-model-cpu"),
    "steps": _other("cost-steps-cuda"),
    "sizes": _sizes,
    "peers": _other("cost-peers-cpu"),
    "ablations": _ablations,
}

if __name__ == "__main__":
    run_command(main)
