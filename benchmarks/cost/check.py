"""The cost model against real steps on this CPU: FLOPs, peak memory and seconds of GRPO at three sizes.

Rates are measured first, at other hidden sizes; then each size runs in a process of its own, whose peak is its own.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cost.counted import counted
from benchmarks.cost.job import ALGORITHMS, Job, Sizes
from benchmarks.cost.model import cost
from benchmarks.cost.rates import Rates, measure_rates
from benchmarks.loss_head import commit, device_name
from benchmarks.memory import peak_bytes, versions
from benchmarks.memory_cases import Case, built
from grpo_fast.engines.base import Sampling
from grpo_fast.grpo import update
from grpo_fast.rollout import Rollout
from grpo_fast.scoring import Scored

BARS = {"flops": 0.05, "memory": 0.15, "seconds": 0.25}
_WORK = {"vocabulary": 4096, "kl": True, "budget": 1024, "prompts": 8, "group": 8, "prompt": 48, "new": 33}
CASES = {
    "hidden 192": Case(hidden=192, inner=512, layers=6, heads=3, key_heads=1, **_WORK),
    "hidden 320": Case(hidden=320, inner=1024, layers=4, heads=5, key_heads=1, **_WORK),
    "hidden 448": Case(hidden=448, inner=1408, layers=4, heads=7, key_heads=1, **_WORK),
}
"""Between the sizes that rates are measured at, and of other proportions"""
REPEATS = 2


def check(output: Path | None, rates: Rates | None = None) -> int:
    """Measure, predict, print and write; exit code 1 where a bar is missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = rates or measure_rates()
    rows = []
    for name, case in CASES.items():
        measured = _alone(case)
        rows.append(_row(name, case, rates, measured))
        print(f"{name}: measured", flush=True)
    record = {
        "benchmark": "cost-model",
        "device": device_name("cpu"),
        "clock": "seconds of the process, one thread; the least of the repeats",
        "versions": versions(),
        "commit": commit(),
        "bars": BARS,
        "rates": asdict(rates),
        "cases": rows,
    }
    torch.set_num_threads(threads)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
    Console(soft_wrap=True).print(_table(rows))
    met = all(abs(row["ratio"][name] - 1) <= bar for row in rows for name, bar in BARS.items())
    return 0 if met else 1


def job_of(case: Case) -> Job:
    """The case as the cost model is told of it."""
    return Job(
        policy=case.model(),
        objectives=2,
        prompts=case.prompts,
        group=case.group,
        prompt_tokens=case.prompt,
        new_tokens=case.new,
        token_budget=case.budget,
        reward_budget=case.reward_tokens,
        max_rows=case.rows,
        kl=case.kl,
    )


def _row(name: str, case: Case, rates: Rates, measured: dict[str, Any]) -> dict[str, Any]:
    """Predicted beside measured, and their ratios."""
    job = job_of(case)
    found = cost("grpo", job, rates, device="cpu", dtype=torch.float32)
    # torch's counter has whole rectangles where the model counts the pairs that see each other
    step = ALGORITHMS["grpo"](replace(job, causal=False), found.memory.counts.trained, 0)
    rectangles = {phase: load.total for phase, load in step.items()}
    predicted = {
        "flops": sum(rectangles.values()),
        "memory": found.memory.peak,
        "seconds": found.step_s,
        "phases": found.seconds,
        "flops_by_phase": rectangles,
        "parts": found.memory.parts,
    }
    ratio = {key: predicted[key] / measured[key] for key in BARS}
    return {
        "name": name,
        "algorithm": "grpo",
        "settings": case.described(),
        "hidden": Sizes.of(job).policy.hidden,
        "predicted": predicted,
        "measured": measured,
        "ratio": ratio,
    }


def _alone(case: Case) -> dict[str, Any]:
    """`measure` in a process started anew."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(case, there))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def _send(case: Case, link: Connection) -> None:
    torch.set_num_threads(1)
    link.send(measure(case))


def measure(case: Case) -> dict[str, Any]:
    """A short step, then whole ones: seconds by phase, the process's peak, and last the FLOPs of one more."""
    run = built(case)
    generator = torch.Generator().manual_seed(0)

    def step(count: int, new: int, clock: Callable[[str], None]) -> None:
        sequences = count * case.group
        prompts = [torch.randint(256, (case.prompt,), generator=generator).tolist() for _ in range(count)]
        clock("other")
        completions = run.engine.generate(prompts, case.group, Sampling(max_new_tokens=new), count)
        clock("generate")
        if run.reward is not None:
            asked = [f"{i // case.group:03d}" + "x" * (case.prompt - 3) for i in range(sequences)]
            run.reward.predict(run.reward.encode(asked, ["y" * (new - 1)] * sequences), case.reward_tokens)
        clock("reward")
        nothing = torch.zeros(sequences, 1)
        rollout = Rollout(
            prompts=[replace(run.prompt, token_ids=ids) for ids in prompts],
            prompt_of=[i // case.group for i in range(sequences)],
            completions=completions,
            texts=[""] * sequences,
            scored=Scored(rewards=nothing, spread=nothing),
            advantages=torch.randn(sequences, generator=generator),
        )
        update(run.policy, run.optimizer, rollout, run.config, lr=1e-5, reference=run.reference)
        clock("update")

    step(1, 2, lambda _: None)
    samples: list[dict[str, float]] = []
    for _ in range(REPEATS):
        phases: dict[str, float] = {}
        marks = [time.process_time()]

        def clock(phase: str, marks: list[float] = marks, phases: dict[str, float] = phases) -> None:
            now = time.process_time()
            phases[phase] = now - marks[-1]
            marks.append(now)

        step(case.prompts, case.new, clock)
        samples.append(phases)
    peak = peak_bytes(case)
    best = min(samples, key=lambda phases: sum(phases.values()))
    flops = counted(lambda: step(case.prompts, case.new, lambda _: None))
    return {
        "flops": flops,
        "memory": peak,
        "seconds": sum(best.values()),
        "phases": best,
        "samples": samples,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    found = Table(title="predicted / measured", title_justify="left")
    for title in ("", "GFLOP", "ratio", "MiB", "ratio", "seconds", "ratio"):
        found.add_column(title, justify="right")
    for row in rows:
        p, m = row["predicted"], row["measured"]
        cells = []
        for key, unit in (("flops", 1e9), ("memory", 2**20), ("seconds", 1)):
            cells += [f"{p[key] / unit:.4g} / {m[key] / unit:.4g}", f"{row['ratio'][key]:.3f}"]
        found.add_row(row["name"], *cells)
    return found
