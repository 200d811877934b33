"""An hour of steps, and what grows meanwhile: `python -m tests.endurance.soak [--minutes 60]`.

One run of `grpo_fast.train` (a tiny model, a Python reward, the next batch generated ahead, checkpoints and evaluations
every few steps) is watched from outside: resident memory, open files, threads, child processes, temporary files, and
processor time and wall time a step. After a warm-up, block means are fitted by a straight line: its slope's 95%
interval (Student's) has to hold zero. The record and its picture say what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from scipy import stats

from benchmarks.machine import commit, device_name
from tests.tiny import save_policy, write_prompts

RESULTS = Path(__file__).parent / "results" / "soak.json"
WARM_UP = 0.15  # of the time: allocators and caches find their size
BLOCKS = 12
QUANTITIES = {
    "memory_mib": "resident memory, MiB",
    "files": "open files",
    "threads": "threads",
    "children": "child processes",
    "temporary": "temporary files",
    "cpu_s": "processor seconds a step",
    "step_s": "seconds a step",
}
REWARDS = """
def counts_e(prompts, completions, **columns):
    return [sum(letter == "e" for letter in text) / 16 for text in completions]
"""
FLAGS = (
    "--policy.model {folder}/llama --data.prompts {folder}/prompts.jsonl --data.eval-size 8 --reward.functions "
    "soak_rewards:counts_e --rollout.prompts-per-step 8 --rollout.group-size 8 --rollout.max-new-tokens 32 "
    "--rollout.ahead --loss.mismatch truncate --optim.lr 1e-7 --loss.kl-coef 0.05 --run.save-every 10 "
    "--run.eval-every 25 --run.steps 1000000 --threads 1 --output-dir {folder}/runs --name soak"
)


@dataclass(frozen=True)
class Look:
    """One look at the run."""

    at_s: float
    steps: int
    processor_s: float
    memory_mib: float
    files: int
    threads: int
    children: int
    temporary: int


def main(argv: list[str] | None = None) -> int:
    """Run, look, fit; exit code 1 where something grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        looks = soaked(Path(name), 60 * asked.minutes, asked.every)
    found = {quantity: trend(series(looks, quantity)) for quantity in QUANTITIES}
    grows = [quantity for quantity, fit in found.items() if fit["slope_ci95"][0] > 0]
    record: dict[str, Any] = {
        "commit": commit(),
        "device": device_name("cpu"),
        "minutes": asked.minutes,
        "steps": looks[-1].steps,
        "grows": grows,
        "trends": found,
        "looks": [vars(look) for look in looks],
    }
    asked.output.parent.mkdir(exist_ok=True)
    asked.output.write_text(json.dumps(record) + "\n")
    draw(looks, found, asked.output.with_suffix(".png"))
    for quantity, fit in found.items():
        low, high = fit["slope_ci95"]
        print(f"{QUANTITIES[quantity]}: {fit['mean']:.4g}, in an hour {low:+.3g} to {high:+.3g}")
    print(f"{record['steps']} steps; grows: {', '.join(grows) or 'nothing'}; {asked.output}")
    return 1 if grows else 0


def soaked(folder: Path, seconds: float, every: float) -> list[Look]:
    """Start the run, look at it until the time is over, and stop it as a user would."""
    save_policy(folder / "llama", "llama", num_hidden_layers=4, hidden_size=64, intermediate_size=128)
    write_prompts(folder / "prompts.jsonl", 64)
    (folder / "soak_rewards.py").write_text(REWARDS)
    (folder / "tmp").mkdir()
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root}:{root / 'kernels'}:{folder}",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "tmp"),
    }
    words = [sys.executable, "-m", "grpo_fast.train", *FLAGS.format(folder=folder).split()]
    output = folder / "output.txt"
    metrics = folder / "runs" / "soak" / "metrics.jsonl"
    looks: list[Look] = []
    with (
        output.open("wb") as said,
        subprocess.Popen(words, stdout=said, stderr=said, env=environment, cwd=folder) as process,
        Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress,
    ):
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.5)
        task, started = progress.add_task("soak", total=seconds), time.monotonic()
        with metrics.open() as rows:
            steps = 0
            while (at := time.monotonic() - started) < seconds:
                assert process.poll() is None, output.read_text()[-2000:]
                steps += sum(line.endswith("\n") for line in rows)
                looks.append(look(process.pid, at, steps, folder / "tmp"))
                progress.update(task, completed=at, description=f"soak: step {steps}")
                time.sleep(every)
        process.send_signal(signal.SIGTERM)
        code = process.wait(900)  # its report of all steps is written first
        assert code == 130, f"stopped by SIGTERM it ended with {code}: {output.read_text()[-2000:]}"
    return looks


def look(pid: int, at_s: float, steps: int, temporary: Path) -> Look:
    """What the kernel says of a process, its threads and its children."""
    place = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
    times = (place / "stat").read_text().rpartition(")")[2].split()
    children = (place / "task" / str(pid) / "children").read_text().split()
    return Look(
        at_s=round(at_s, 2),
        steps=steps,
        processor_s=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        memory_mib=int(status["VmRSS"].split()[0]) / 1024,
        files=len(list((place / "fd").iterdir())),
        threads=int(status["Threads"]),
        children=len(children),
        temporary=sum(1 for _ in temporary.rglob("*")),
    )


def series(looks: list[Look], quantity: str) -> list[tuple[float, float]]:
    """(hours, value) after the warm-up; what is a step's is taken between the ends of blocks."""
    warm = [look for look in looks if look.at_s >= WARM_UP * looks[-1].at_s]
    if quantity not in ("cpu_s", "step_s"):
        return [(look.at_s / 3600, float(getattr(look, quantity))) for look in warm]
    size = max(1, len(warm) // BLOCKS)
    found = []
    for first, last in zip(warm[::size], warm[size::size], strict=False):
        steps = max(1, last.steps - first.steps)
        spent = last.processor_s - first.processor_s if quantity == "cpu_s" else last.at_s - first.at_s
        found.append(((first.at_s + last.at_s) / 7200, spent / steps))
    return found


def trend(points: list[tuple[float, float]]) -> dict[str, Any]:
    """Mean, slope an hour, and the slope's 95% interval from the means of blocks, which hardly hang together."""
    size = max(1, len(points) // BLOCKS)
    blocks = [points[first : first + size] for first in range(0, len(points) - size + 1, size)]
    hours = [statistics.fmean(hour for hour, _ in block) for block in blocks]
    values = [statistics.fmean(value for _, value in block) for block in blocks]
    if min(values) == max(values):
        return {"mean": values[0], "slope": 0.0, "slope_ci95": [0.0, 0.0]}
    fit: Any = stats.linregress(hours, values)
    half = float(stats.t.ppf(0.975, len(blocks) - 2) * fit.stderr)
    slope = float(fit.slope)
    return {"mean": statistics.fmean(values), "slope": slope, "slope_ci95": [slope - half, slope + half]}


def draw(looks: list[Look], found: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel a quantity."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(QUANTITIES), 1, sharex=True, figsize=(7, 1.5 * len(QUANTITIES)))
    for panel, (quantity, title) in zip(panels, QUANTITIES.items(), strict=True):
        points = series(looks, quantity)
        panel.plot([60 * hour for hour, _ in points], [value for _, value in points], linewidth=1)
        low, high = found[quantity]["slope_ci95"]
        panel.set_title(f"{title}: {low:+.2g} to {high:+.2g} an hour", loc="left", fontsize=9)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
