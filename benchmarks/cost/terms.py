"""Whether the cells of a record may be compared at all, and what must be said of them before their figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cost.analysis import budgeted, cells_of, name_of
from benchmarks.cost.curves import CURRENCIES, FEWEST, end
from grpo_fast.errors import UserError


def check_equal_terms(record: dict[str, Any]) -> None:
    """UserError naming the cell that started from, learned from or was asked something else than its seed's others.

    A cell whose process died before it had loaded anything has no fingerprint, and nothing that could be compared.
    """
    first: dict[int, dict[str, Any]] = {}
    seen: set[tuple[str, int]] = set()
    for cell in record["cells"]:
        name = f"{cell['algorithm']}, seed {cell['seed']}"
        if (cell["algorithm"], cell["seed"]) in seen:
            raise UserError(f"{name} is in the record twice; a cell may be measured once")
        seen.add((cell["algorithm"], cell["seed"]))
        if not cell["fingerprint"]:
            continue
        other = first.setdefault(cell["seed"], cell)
        for part in sorted(set(cell["fingerprint"]) | set(other["fingerprint"])):
            if cell["fingerprint"].get(part) != other["fingerprint"].get(part):
                raise UserError(
                    f"{name} had another {part.replace('_', ' ')} than {other['algorithm']} of the same seed; "
                    "cells of one seed must share it: measure this cell again"
                )


def mixed(record: dict[str, Any]) -> list[str]:
    """What stands above every figure: that cells come from different machines or from different or unknown code."""
    found = []
    devices = sorted({cell.get("device", record["device"]) for cell in record["cells"]} | {record["device"]})
    if len(devices) > 1:
        found.append(f"Cells come from different devices ({', '.join(devices)}): times do not compare.")
    threads = sorted({cell.get("threads", record["threads"]) for cell in record["cells"]})
    if len(threads) > 1:
        found.append(f"Cells ran on {' or '.join(map(str, threads))} threads: times do not compare.")
    built = {str(cell["versions"]) for cell in record["cells"] if cell.get("versions")}
    if len(built) > 1:
        found.append("Cells ran with different versions of PyTorch or its libraries: times do not compare.")
    commits = sorted({cell.get("commit", record["commit"]) for cell in record["cells"]} | {record["commit"]})
    if len(commits) > 1:
        found.append(
            f"Cells come from different commits ({', '.join(map(short, commits))}): the code differs."
        )
    if any(commit.endswith("+") for commit in commits):
        found.append("The code had changes that are in no commit (marked +).")
    return found


def warnings(record: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures: what is mixed, ended badly or early, or is missing; few seeds."""
    found, cells = mixed(record), record["cells"]
    if record["quick"]:
        found.append(
            "A quick run: small budgets, few seeds; it shows that everything works, not who is cheaper."
        )
    if any(cell.get("quality") == "reward" for cell in cells):
        found.append("There was no judge: qualities are scores of the very reward model that was optimised.")
    seeds = sorted({cell["seed"] for cell in cells})
    if len(seeds) < 2:
        found.append("One seed: no interval, and no order is certain.")
    elif len(seeds) < FEWEST:
        found.append(f"{len(seeds)} seeds: too few for an order to be called certain.")
    for name in record["algorithms"]:
        missing = [seed for seed in seeds if seed not in cells_of(record, name)]
        if missing:
            which = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            found.append(
                f"{name_of(record, name)}: not measured{'' if missing == seeds else f' with {which}'}."
            )
        found += [
            f"{name_of(record, name)}, seed {seed}: {_ending(cell)}"
            for seed, cell in cells_of(record, name).items()
            if cell["status"] != "finished"
        ]
        for money in budgeted(record):
            short_of = [
                seed
                for seed, cell in cells_of(record, name).items()
                if cell["status"] == "finished" and end(cell, money) < 0.98 * record["budget"][money]
            ]
            if short_of:
                found.append(
                    f"{name_of(record, name)} ended before the budget of {CURRENCIES[money]} was used up "
                    f"(seeds {', '.join(map(str, short_of))}): compared at what it had spent."
                )
    return found


def mixture(records: Sequence[dict[str, Any]]) -> list[str]:
    """What must be said where records stand side by side: that machine, threads or code differ."""
    found = []
    for field, text in (("device", "devices"), ("threads", "numbers of threads"), ("commit", "commits")):
        values = sorted({str(record[field]) for record in records if field in record})
        if len(values) > 1:
            shown = map(short, values) if field == "commit" else values
            found.append(
                f"The records below come from different {text} ({', '.join(shown)}); no figure of one is "
                "compared with one of another."
            )
    return found


def short(commit: str) -> str:
    """The first ten digits of a commit, and its + where it has one."""
    return commit[:10] + ("+" if commit.endswith("+") and len(commit) > 10 else "")


def _ending(cell: dict[str, Any]) -> str:
    why = f" ({cell['why'].rstrip('.')})" if cell.get("why") else ""
    held = "its quality is that of its last evaluation" if cell["curve"] else "it has no evaluation"
    return f"{cell['status']}{why}; it counts as never reaching any target, and {held}."
