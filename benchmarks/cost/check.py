"""The cost model against real steps on this CPU: FLOPs, peak memory and seconds of GRPO, PPO and DPO at three sizes.

Rates are measured first, at other hidden sizes; then each algorithm and size runs in a process of its own, whose peak
is its own.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.baselines.dpo import DPO
from benchmarks.baselines.policy_gradient import PolicyGradient
from benchmarks.baselines.ppo import PPO
from benchmarks.cost.algorithms import ALGORITHMS as BASELINES
from benchmarks.cost.counted import counting
from benchmarks.cost.job import ALGORITHMS, Job, Sizes
from benchmarks.cost.lab import Lab
from benchmarks.cost.ledger import Budget, Ledger
from benchmarks.cost.model import cost
from benchmarks.cost.rates import Rates, measure_rates
from benchmarks.machine import commit, device_name
from benchmarks.memory import peak_bytes, versions
from benchmarks.memory_cases import Case, built
from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.base import Sampling
from grpo_fast.models.reward_set import RewardSet
from grpo_fast.scoring import Scorer
from grpo_fast.task import Task

BARS = {"flops": 0.05, "memory": 0.15, "seconds": 0.25}
_WORK = {"vocabulary": 4096, "kl": True, "budget": 1024, "prompts": 8, "group": 8, "prompt": 48, "new": 33}
CASES = {
    "hidden 192": Case(hidden=192, inner=512, layers=6, heads=3, key_heads=1, **_WORK),
    "hidden 320": Case(hidden=320, inner=1024, layers=4, heads=5, key_heads=1, **_WORK),
    "hidden 448": Case(hidden=448, inner=1408, layers=4, heads=7, key_heads=1, **_WORK),
}
"""Between the sizes that rates are measured at, and of other proportions"""
CHECKED = ("grpo", "ppo", "ppo_shared", "dpo_online")
"""DPO offline has the steps of DPO online without its rollouts"""
REPEATS = 2


def check(output: Path | None, rates: Rates | None = None) -> int:
    """Measure, predict, print and write; exit code 1 where a bar is missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = rates or measure_rates()
    rows = []
    for algorithm, (name, case) in itertools.product(CHECKED, CASES.items()):
        rows.append(_row(algorithm, name, case, rates, _alone(algorithm, case)))
        print(f"{algorithm}, {name}: measured", flush=True)
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


def _row(algorithm: str, name: str, case: Case, rates: Rates, measured: dict[str, Any]) -> dict[str, Any]:
    """Predicted beside measured, and their ratios."""
    job = job_of(case)
    found = cost(algorithm, job, rates, device="cpu", dtype=torch.float32)
    # torch's counter has whole rectangles where the model counts the pairs that see each other
    counts = found.memory.counts.trained, found.memory.value_parameters
    step = ALGORITHMS[algorithm](replace(job, causal=False), *counts)
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
        "algorithm": algorithm,
        "settings": case.described(),
        "hidden": Sizes.of(job).policy.hidden,
        "predicted": predicted,
        "measured": measured,
        "ratio": ratio,
    }


def _alone(algorithm: str, case: Case) -> dict[str, Any]:
    """`measure` in a process started anew."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(algorithm, case, there))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def _send(algorithm: str, case: Case, link: Connection) -> None:
    torch.set_num_threads(1)
    link.send(measure(algorithm, case))


class _Watched(Ledger):
    """Notes what each step takes, and counts the last one's FLOPs with torch's counter."""

    def __init__(self, steps: int, case: Case) -> None:
        super().__init__(Budget(steps=steps), torch.device("cpu"))
        self._last, self._case = steps - 1, case
        self.seconds: list[dict[str, float]] = []
        self.peak = self.measured_flops = 0
        self._clock = 0.0

    def _take_time(self) -> None:
        now = time.process_time()
        if self._running:
            self.phase_s[self._running[-1]] += now - self._clock
        self._clock = now

    def steps(self) -> Iterator[int]:
        for step in super().steps():
            before = dict(self.phase_s)
            if step < self._last:
                yield step
                self.seconds.append({k: v - before.get(k, 0.0) for k, v in self.phase_s.items()})
                continue
            self.peak = peak_bytes(self._case)
            with counting() as counter:
                yield step
            self.measured_flops = counter.get_total_flops()


class _Readable(Task):
    """Completions read as one letter a token, so that the reward model is given as many tokens as were drawn."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids[:-1])


def measure(algorithm: str, case: Case) -> dict[str, Any]:
    """Whole steps of the baseline: seconds by phase, the process's peak, and the FLOPs of the last one.

    The first step gives the optimizer its state and is not timed; the seconds are the least of the others'.
    """
    settings = {
        "grpo": PolicyGradient(mode="scalarized"),
        "ppo": PPO(epochs=2, minibatches=2),
        "ppo_shared": PPO(epochs=2, minibatches=2, shared=True),
        "dpo_online": DPO(online=True, batches=1, samples=case.group),
    }[algorithm]
    run = built(replace(case, kl=False))  # the baselines make their own reference
    assert run.reward is not None
    config = replace(run.config, engine=EngineSettings(max_mismatch=0.0))
    # all different, or the reward model reads what is common once
    texts = [f"{i:03d}".ljust(case.prompt, "x") for i in range(case.prompts * case.group)]
    prompts = [replace(run.prompt, text=text, token_ids=run.policy.tokenizer.encode(text)) for text in texts]
    task = _Readable(
        policy=run.policy,
        scorer=Scorer.create(
            replace(config.reward, model=(), functions=()),
            RewardSet.of([run.reward]),
            None,
            token_budget=case.reward_tokens,
        ),
        sampling=Sampling(max_new_tokens=case.new),
        prompts=prompts,
        heldout=[],
    )
    ledger = _Watched(REPEATS + 2, case)
    with TemporaryDirectory() as folder:
        run.policy.save(Path(folder) / "start")
        lab = Lab.of(config, task, run.engine, ledger, start=Path(folder) / "start")
        BASELINES[algorithm].train(lab, settings)
    best = min(ledger.seconds[1:], key=lambda phases: sum(phases.values()))
    return {
        "flops": ledger.measured_flops,
        "memory": ledger.peak,
        "seconds": sum(best.values()),
        "phases": best,
        "samples": ledger.seconds,
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
        found.add_row(f"{row['algorithm']}, {row['name']}", *cells)
    return found
