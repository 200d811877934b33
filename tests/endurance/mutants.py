"""Mutation testing of the four operations: are their tests able to fail?

    python -m tests.endurance.mutants --minutes 40

Each mutant is one small change of the source (cosmic-ray's operators: a number off by one, a comparison, a sum for a
product, a condition turned round, a loop that never runs). It is killed where the tests of its file fail. cosmic-ray
starts a Python for each mutant, which with torch takes longer than the tests; here each is tried in a fork of a process
that has torch already, and the changed source is handed to the import system instead of written to disk. (mutmut forks
too, but leaves decorated functions alone, and the operations are just that.)

Left out are changes that could not fail to fail (bit operators between floats, types, decorators) or to pass (`is` for
`==`, an order of names): they would only decorate the number. Of the rest, each place is changed in one way of each
kind, drawn by the seed. Kernels of Triton and the head shared out over processes have their own tests, not run here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import commit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "grpo_kernels"
RESULTS = Path(__file__).parent / "results" / "mutants.json"
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.json"
MEMORY = 24 << 30
"""Bytes of address space of a mutant: a size that explodes fails instead of taking the machine with it."""

ADVANTAGES, REFUSALS, TABLE, LOSS, HEAD, TRUTH, PRESETS, OPERATORS, EDGES = (
    f"tests/test_kernels_{name}.py"
    for name in [
        "advantages",
        "refusals",
        "loss_table",
        "loss",
        "head",
        "truth",
        "presets",
        "operators",
        "edges",
    ]
)
TESTS: dict[str, list[str]] = {
    # the tests of each file, the ones that find most first
    "group_advantages": [ADVANTAGES, EDGES, REFUSALS, OPERATORS],
    "grpo_loss": [TABLE, LOSS, EDGES, REFUSALS, OPERATORS],
    "linear_grpo_loss": [LOSS, TRUTH, EDGES, REFUSALS, OPERATORS],
    "linear_logprob": [HEAD, EDGES, REFUSALS, TRUTH, OPERATORS],
    "loss_config": [PRESETS, TABLE, EDGES, REFUSALS, LOSS],
    "_token_loss": [TABLE, LOSS, PRESETS, EDGES, REFUSALS],
    "_loss_arguments": [TABLE, LOSS, EDGES, REFUSALS, OPERATORS],
    "_arguments": [EDGES, REFUSALS, TABLE],
    "_head": [HEAD, EDGES, REFUSALS, TRUTH, LOSS],
    "_torch_head": [HEAD, TRUTH, EDGES, LOSS],
    "_backends": [HEAD, EDGES, REFUSALS],
    "_operators": [LOSS, EDGES, REFUSALS, OPERATORS],
}
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}
BITS = {"BitOr", "BitAnd", "BitXor"}
COMPARISONS = ({"Eq", "NotEq"}, {"Lt", "LtE", "Gt", "GtE"}, {"Is", "IsNot"})


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one file."""

    file: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str


def worth_trying(operator: str) -> bool:
    """Whether a change of this kind may both pass and fail."""
    kind, *names = operator.removeprefix("core/Replace").split("_")
    if kind in ("BinaryOperator", "ComparisonOperator"):
        families = (ARITHMETIC, BITS) if kind == "BinaryOperator" else COMPARISONS
        return any(set(names) <= family for family in families)
    return not operator.endswith(("RemoveDecorator", "VariableInserter", "VariableReplacer"))


def of_types(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file lie, and the module's own assignments of types."""
    nodes: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
            nodes += [argument.annotation for argument in arguments] + [node.returns]
        elif isinstance(node, ast.AnnAssign):
            nodes.append(node.annotation)
    nodes += [
        node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)
    ]
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for node in nodes:
        if isinstance(node, ast.expr | ast.stmt):
            end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
            found.append(((node.lineno, node.col_offset), end))
    return found


def mutants_of(name: str, draw: random.Random) -> list[Mutant]:
    """One change of each kind at each place of a file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    types = of_types(ast.parse(source))
    places: dict[tuple[Any, str], list[tuple[str, int]]] = {}
    for operator_name in filter(worth_trying, operator_names()):
        operator = get_operator(operator_name)()
        kind = operator_name.split("_")[0]
        count = 0
        for node in ast_nodes(get_ast(source)):
            for position in operator.mutation_positions(node):
                if not any(start <= position[0] and position[1] <= end for start, end in types):
                    places.setdefault((position, kind), []).append((operator_name, count))
                count += 1
    found = []
    lines = source.splitlines()
    for (position, _), choices in sorted(places.items()):
        operator_name, occurrence = draw.choice(choices)
        changed = mutate_code(source, get_operator(operator_name)(), occurrence)
        if changed is None or changed == source:
            continue
        line = position[0][0]
        after = next((new for old, new in zip(lines, changed.splitlines(), strict=False) if old != new), "")
        found.append(
            Mutant(
                file=name,
                line=line,
                operator=operator_name,
                occurrence=occurrence,
                before=lines[line - 1].strip(),
                after=after.strip(),
            )
        )
    return found


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the package from another source."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = f"grpo_kernels.{name}", source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        place = str(PACKAGE / f"{fullname.rpartition('.')[2]}.py")
        return importlib.util.spec_from_file_location(fullname, place, loader=self)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, module.__spec__.origin, "exec"), module.__dict__)


class FirstFailure:
    """Remembers which test failed first."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def run_tests(name: str, source: str | None, answer: int) -> None:
    """In the fork: the tests of a file with its changed source; the outcome goes to the pipe `answer`."""
    import hypothesis
    import pytest

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    hypothesis.settings.register_profile(
        "mutants",
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    hypothesis.settings.load_profile("mutants")
    if source is not None:
        sys.meta_path.insert(0, Changed(name, source))
    failure = FirstFailure()
    there = [path for path in TESTS[name] if (ROOT / path).is_file()]
    without = [f"-pno:{plugin}" for plugin in ("cacheprovider", "xdist", "benchmark", "pytest_cov")]
    code = pytest.main([*there, "-x", "-q", "-k", "not triton", *without], plugins=[failure])
    os.write(answer, f"{int(code)} {failure.name}".encode())
    os._exit(0)


def outcome(name: str, source: str | None, limit_s: float) -> tuple[str, str, float]:
    """("killed" or "survived", by what, seconds) of one mutant; of the source as it is for None."""
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            run_tests(name, source, writer)
        finally:
            os._exit(70)
    os.close(writer)
    late = False
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() - started > limit_s and not late:
            late = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    said = os.read(reader, 65536).decode()
    os.close(reader)
    seconds = time.monotonic() - started
    if not said:
        return "killed", "time limit" if late else "crash", seconds
    code, _, test = said.partition(" ")
    return ("survived" if code == "0" else "killed"), test or f"pytest's exit code {code}", seconds


def chosen(files: list[str], most: int | None, seed: int) -> tuple[list[Mutant], int]:
    """The mutants to try, in an order that is even at any length, and how many there are."""
    draw = random.Random(seed)
    every = [mutant for name in files for mutant in mutants_of(name, draw)]
    draw.shuffle(every)
    return every[:most], len(every)


def source_of(mutant: Mutant) -> str:
    """The changed file."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (PACKAGE / f"{mutant.file}.py").read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    assert changed is not None
    return changed


def equivalents() -> dict[tuple[str, str, str], str]:
    """Changes known to change nothing that could be seen, and why: by file, line before, line after."""
    if not EQUIVALENT.is_file():
        return {}
    rows = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    return {(row["file"], row["before"], row["after"]): row["reason"] for row in rows}


def warm() -> None:
    """Import what every fork needs, and nothing that is mutated."""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    import hypothesis
    import numpy
    import pytest
    import torch._dynamo
    import torch.testing._internal.optests

    _ = hypothesis, numpy, pytest
    torch.set_num_threads(1)
    assert not any(module.startswith("grpo_kernels") for module in sys.modules)


def tried(mutants: list[Mutant], limits: dict[str, float], until: float) -> Iterator[dict[str, Any]]:
    """Outcomes, one after the other, while there is time."""
    for mutant in mutants:
        if time.monotonic() > until:
            return
        result, by, seconds = outcome(mutant.file, source_of(mutant), limits[mutant.file])
        yield asdict(mutant) | {"outcome": result, "by": by, "seconds": round(seconds, 2)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two outcomes are of one mutant."""
    return all(one[name] == other[name] for name in ("file", "operator", "occurrence"))


def record(rows: list[dict[str, Any]], there: int, seed: int) -> dict[str, Any]:
    """What is kept: the counts, and every survivor."""
    known = equivalents()
    for row in rows:
        if row["outcome"] == "survived" and (reason := known.get((row["file"], row["before"], row["after"]))):
            row |= {"outcome": "equivalent", "reason": reason}

    def counts(of: list[dict[str, Any]]) -> dict[str, Any]:
        found = Counter(row["outcome"] for row in of)
        changing = len(of) - found["equivalent"]
        return {
            "tried": len(of),
            "killed": found["killed"],
            "equivalent": found["equivalent"],
            "survived": found["survived"],
            "killed_of_all": round(found["killed"] / max(1, len(of)), 4),
            "killed_of_not_equivalent": round(found["killed"] / max(1, changing), 4),
        }

    by_operator: dict[str, list[dict[str, Any]]] = {}
    by_file: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_operator.setdefault(row["operator"].split("_")[0].removeprefix("core/"), []).append(row)
        by_file.setdefault(row["file"], []).append(row)
    return {
        "mutants": there,
        **counts(rows),
        "commit": commit(),
        "seed": seed,
        "seconds": round(sum(row["seconds"] for row in rows)),
        "by_time_limit": sum(row["by"] == "time limit" for row in rows),
        "files": {name: counts(by_file[name]) for name in sorted(by_file)},
        "operators": {name: counts(by_operator[name]) for name in sorted(by_operator)},
        "rows": sorted(rows, key=lambda row: (row["outcome"] == "killed", row["file"], row["line"])),
    }


def written(kept: dict[str, Any]) -> str:
    """The record as JSON, a mutant a line."""
    rows = kept["rows"]
    head = json.dumps(kept | {"rows": []}, indent=1, ensure_ascii=False).removesuffix("[]\n}")
    return head + "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=40.0, help="stop after this long")
    parser.add_argument(
        "--mutants", type=int, help="how many to try at most; all that there is time for by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the order")
    parser.add_argument("--files", nargs="*", choices=sorted(TESTS), default=list(TESTS))
    parser.add_argument(
        "--at", nargs="*", default=[], metavar="FILE:LINE", help="only mutants of these lines"
    )
    parser.add_argument("--again", action="store_true", help="only those that --output says were not killed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.chdir(ROOT)
    until = time.monotonic() + 60 * options.minutes
    mutants, there = chosen(options.files, options.mutants, options.seed)
    rows: list[dict[str, Any]] = []
    if options.again:
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
        names = list(Mutant.__dataclass_fields__)
        mutants = [
            Mutant(**{name: row[name] for name in names}) for row in rows if row["outcome"] != "killed"
        ]
    if options.at:
        mutants = [mutant for mutant in mutants if f"{mutant.file}:{mutant.line}" in options.at]
    warm()
    limits = {}
    for name in sorted({mutant.file for mutant in mutants}):
        result, by, seconds = outcome(name, None, 600.0)
        print(f"{name}: its tests take {seconds:.1f} s", flush=True)
        if result != "survived":
            print(f"the tests of {name} fail as it is: {by}", file=sys.stderr)
            return 1
        limits[name] = 20 + 4 * seconds
    for count, row in enumerate(tried(mutants, limits, until), start=1):
        rows = [other for other in rows if not same(other, row)] + [row]
        if row["outcome"] == "survived":
            change = f"{row['before']}   ->   {row['after']}"
            print(f"{count}/{len(mutants)} survived: {row['file']}:{row['line']} {change}", flush=True)
    kept = record(rows, there, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(written(kept), encoding="utf-8")
    told = {key: value for key, value in kept.items() if not isinstance(value, list | dict)}
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
