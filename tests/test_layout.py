"""The floors of the architecture and the contents of the wheel."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_fast"

# A file imports from its own floor and from lower ones only. `miniature` is a data source beside them.
FLOORS = {
    1: "errors shown config data rewards packing attention run report optim trust budget parallel typed",
    2: "models engines memory",
    3: "scoring task rollout rollout_codec pipeline evaluate",
    4: "grpo dumps constraint state snapshot summary",
    5: "train fit plan generate train_reward reward_plan reward_task doctor compare replay watch",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()} | {"miniature": 4.5}


def imported_modules(path: Path) -> set[str]:
    """First name below `grpo_fast` of everything a file imports from the project, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {
            name.split(".")[1] for name in names if name.startswith("grpo_fast.") and not name.endswith("__")
        }
    return found


def test_every_file_has_a_floor_and_imports_downwards():
    for path in sorted(PACKAGE.rglob("*.py")):
        unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if unit == "__init__":
            continue
        assert unit in FLOOR_OF, f"{path.name} has no floor: add it to FLOORS"
        for other in imported_modules(path) - {unit}:
            assert FLOOR_OF[other] <= FLOOR_OF[unit], f"{path.name} (floor {FLOOR_OF[unit]}) imports {other}"


def test_no_import_cycles():
    edges: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        edges.setdefault(unit, set()).update(imported_modules(path) - {unit})
    done: set[str] = set()

    def visit(unit: str, trail: tuple[str, ...]) -> None:
        assert unit not in trail, f"import cycle: {' -> '.join([*trail, unit])}"
        if unit not in done:
            for other in edges.get(unit, ()):
                visit(other, (*trail, unit))
            done.add(unit)

    for unit in edges:
        visit(unit, ())


def test_what_is_checked_strictly_is_there():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
    assert settings["strict"] and not [path for path in settings["strict"] if not (ROOT / path).exists()]


def test_kernels_import_nothing_of_the_trainer():
    for path in (ROOT / "kernels" / "grpo_kernels").glob("*.py"):
        assert "grpo_fast" not in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="the build back-end is part of the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_two_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"grpo_fast", "grpo_kernels"}


def test_the_wheel_works_where_the_checkout_is_not(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import grpo_fast, grpo_kernels\n"
        "assert grpo_fast.__file__.startswith(sys.argv[1]) and grpo_kernels.__file__.startswith(sys.argv[1])\n"
        "from grpo_fast.train import main\n"
        "main(['--dry-run'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(site)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1024" in done.stdout or "parameters" in done.stdout


def test_the_readme_is_finished():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", line)]
    named = re.findall(r"(?:\]\(|`)((?:benchmarks|docs|configs|kernels)/[\w./-]+\.\w+)", text)
    assert named and not [path for path in named if not (ROOT / path).is_file()]
