"""Many cells, each in a process of its own, some at a time; what is finished is never run again.

A job's file stands beside its cell: a cell counts as finished where the file says exactly what is asked for now.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cost.cell import Job
from benchmarks.machine import commit, device_name
from grpo_fast.config.resolve import resolve_device
from grpo_fast.errors import UserError
from grpo_fast.run.metrics import write_atomically

ROOT = Path(__file__).parents[2]
PATIENCE_S = 5.0
Tell = Callable[[str], None]


@dataclass
class Running:
    """A process and what it works on."""

    process: subprocess.Popen[bytes]
    target: Path
    job: Job
    started: float


def run_all(jobs: Mapping[Path, Job], *, parallel: int, tell: Tell) -> None:
    """Run every job whose cell is not finished, `parallel` at a time; `tell` is given a line for each.

    A process that dies leaves a cell of status `failed`, which the next call tries again. UserError where one refuses
    its settings: the others would too.
    """
    left = [(target, job) for target, job in jobs.items() if not is_finished(target, job)]
    if len(left) < len(jobs):
        tell(f"{len(jobs) - len(left)} of {len(jobs)} are finished already")
    begun, done, total = time.monotonic(), 0, len(left)
    running: list[Running] = []
    try:
        while left or running:
            while left and len(running) < parallel:
                running.append(_start(*left.pop(0)))
            time.sleep(0.2)
            for work in [work for work in running if work.process.poll() is not None]:
                running.remove(work)
                done += 1
                line = _end(work)
                each = (time.monotonic() - begun) / done
                tell(f"{done}/{total} {line}; about {each * (total - done) / 60:.0f} min left")
    finally:
        for work in running:
            work.process.terminate()
        for work in running:
            try:
                work.process.wait(timeout=PATIENCE_S)  # it may have a server of its own to end
            except subprocess.TimeoutExpired:
                work.process.kill()


def is_finished(target: Path, job: Job) -> bool:
    """Whether the cell is there, of this very job, and not one that failed."""
    if not target.is_file() or _read(_job_file(target)) != asdict(job):
        return False
    return (_read(target) or {"status": "failed"}).get("status") != "failed"


def _start(target: Path, job: Job) -> Running:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    write_atomically(_job_file(target), json.dumps(asdict(job)))
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if job.threads:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    with target.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cost.cell", _job_file(target), target],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    return Running(process=process, target=target, job=job, started=time.monotonic())


def _end(work: Running) -> str:
    """Settle a process that has ended; the line that says what came of it."""
    name = f"{work.job.algorithm or 'models'}, seed {work.job.seed}"
    seconds = f"{time.monotonic() - work.started:.0f} s"
    log = work.target.with_suffix(".log")
    last = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
    code = work.process.returncode
    if code == 2:
        raise UserError(f"{name}: {last.removeprefix('error: ')}")
    if code != 0:
        why = f"its process ended with {code}: {last} (all of it: {log})"
        write_atomically(work.target, json.dumps(failed_cell(work.job, why), indent=1) + "\n")
        return f"{name}: failed in {seconds}: {why}"
    cell = _read(work.target)
    if cell is None or not cell.get("curve"):
        return f"{name}: {seconds}"
    mean, why = cell["curve"][-1].get("mean"), f" ({cell['why']})" if cell["why"] else ""
    quality = "" if mean is None else f" at {mean:.3f}"
    return f"{name}: {cell['status']}{quality} after {cell['curve'][-1]['wall_s']:.0f} s of its own, {seconds}{why}"


def failed_cell(job: Job, why: str) -> dict[str, Any]:
    """The record of a run that left nothing behind."""
    return {
        "algorithm": job.algorithm,
        "seed": job.seed,
        "settings": job.choice,
        "status": "failed",
        "why": why,
        "device": device_name(resolve_device(job.config()).type),
        "commit": commit(),
        "fingerprint": None,
        "memory": None,
        "phase_s": {},
        "flops": {},
        "curve": [],
    }


def _job_file(target: Path) -> Path:
    return target.with_suffix(".job.json")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
