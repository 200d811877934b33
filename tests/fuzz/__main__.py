"""Fuzzing of every parser and loader: `python -m tests.fuzz --inputs 100000 --seed 0 [--target NAME]`.

Inputs are attempted in a worker process with limits of time and memory. Every input that breaks something is kept in
`tests/fuzz/cases/`, which the tests replay, and the record goes to `tests/fuzz/results/fuzz.json`. Exit code 1 where
there is a finding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from grpo_fast.errors import nearest
from tests.fuzz.targets import TARGETS, inputs_of

ROOT = Path(__file__).parents[2]
CASES, RECORD = Path(__file__).parent / "cases", Path(__file__).parent / "results" / "fuzz.json"
SILENCE_S = 60.0
"""Without a word of the worker's for this long it hangs where no Python signal reaches it."""


@dataclass
class Findings:
    """What came of a run."""

    inputs: dict[str, int] = field(default_factory=dict)
    findings: list[dict[str, str]] = field(default_factory=list)
    data: list[tuple[str, bytes]] = field(default_factory=list)

    def add(self, target: str, problem: str, data: bytes) -> None:
        """One more; the same fault of the same target once."""
        key = problem.partition(": ")[0]
        if all(
            (known["target"], known["problem"].partition(": ")[0]) != (target, key) for known in self.findings
        ):
            self.findings.append({"target": target, "problem": problem})
            self.data.append((target, data))


def fuzz(
    numbers: dict[str, int],
    seed: int,
    *,
    planted: bool = False,
    silence_s: float = SILENCE_S,
    tell=lambda *_: None,
) -> Findings:
    """Attempt `numbers` inputs of each target; a worker that dies or hangs is replaced and goes on behind its input."""
    found, left, first = Findings(), dict(numbers), 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        while left:
            name, at, died = _listen(left, seed, first, Path(scratch), planted, silence_s, found, tell)
            if not died:
                break
            current = Path(scratch) / "current"
            if not current.exists():
                raise RuntimeError(f"the worker did not come to its first input: {died}")
            found.add(name, died, current.read_bytes())
            first = at + 1
            left = {target: number for target, number in left.items() if target not in found.inputs}
            if first >= left.get(name, 0):
                found.inputs[name] = left.pop(name, 0)
                first = 0
    return found


def _listen(
    left: dict[str, int],
    seed: int,
    first: int,
    scratch: Path,
    planted: bool,
    silence_s: float,
    found: Findings,
    tell: Any,
) -> tuple[str, int, str]:
    """One worker until its end: (target, place it had reached, what it died of, empty where it came to the end)."""
    asked = {"numbers": left, "seed": seed, "first": first, "scratch": str(scratch), "planted": planted}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.worker", json.dumps(asked)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert worker.stdout is not None and worker.stderr is not None
    lines: queue.Queue[str] = queue.Queue()
    last: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: [lines.put(line) for line in worker.stdout or ()] + [lines.put("")], daemon=True
        ),
        threading.Thread(
            target=lambda: [
                last.append(line) or last.__delitem__(slice(0, -5)) for line in worker.stderr or ()
            ],
            daemon=True,
        ),
    ]
    for thread in threads:
        thread.start()
    name, at = next(iter(left)), first
    while True:
        try:
            line = lines.get(timeout=silence_s)
        except queue.Empty:
            worker.kill()
            worker.wait()
            return name, at, f"hang in the interpreter: no sign of life for {silence_s:g} s"
        if not line:
            code = worker.wait()
            threads[1].join(5)
            return (
                name,
                at,
                "" if code == 0 else f"died with code {code}: {' '.join(''.join(last).split())[-200:]}",
            )
        said = json.loads(line)
        name = said["target"]
        at = said.get("at", said.get("begun", at))
        if "problem" in said:
            found.add(name, said["problem"], bytes.fromhex(said["data"]))
        if "done" in said:
            found.inputs[name] = said["done"]
        tell(name, said.get("done", at), len(found.findings))


def keep(found: Findings) -> None:
    """Write every input that broke something, `TARGET--HASH`, to the cases."""
    CASES.mkdir(exist_ok=True)
    for target, data in found.data:
        (CASES / f"{target}--{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--target", action="append", help="only targets that begin with this; may be repeated"
    )
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record goes (%(default)s)")
    asked = parser.parse_args(argv)
    chosen = [name for name in TARGETS if not asked.target or name.startswith(tuple(asked.target))]
    if not chosen:
        parser.error(
            f"no target is called {asked.target[0]}; did you mean {nearest(asked.target[0], TARGETS)}?"
        )
    numbers = {name: number for name, number in inputs_of(asked.inputs).items() if name in chosen}
    started = time.time()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("", total=sum(numbers.values()))
        order = list(numbers)

        def tell(name: str, at: int, findings: int) -> None:
            before = sum(numbers[other] for other in order[: order.index(name)])
            progress.update(task, completed=before + at, description=f"{name}, {findings} findings")

        found = fuzz(numbers, asked.seed, tell=tell)
    keep(found)
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain", "grpo_fast"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    record = {
        "suite": "fuzz",
        "seed": asked.seed,
        "commit": commit.stdout.strip() + "+" * bool(changed.stdout.strip()),
        "seconds": round(time.time() - started, 1),
        "inputs": sum(found.inputs.values()),
        **{key: value for key, value in asdict(found).items() if key == "findings"},
        "targets": found.inputs,
    }
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    asked.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for finding in found.findings:
        print(f"{finding['target']}: {finding['problem']}")
    print(
        f"{record['inputs']:,} inputs, {len(found.findings)} findings, {record['seconds']:,} s: {asked.record}"
    )
    return 1 if found.findings else 0


if __name__ == "__main__":
    sys.exit(main())
