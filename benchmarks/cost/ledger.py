"""What a run costs, written down while it runs, and when it has used up its budget.

The clock runs inside phases only: evaluating, counting and packing for the count are off it.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.machine import forget_peak, resident, return_freed_memory
from grpo_fast.optim.optimizer import Optimizer

Phase = Literal["generate", "reward", "reference", "values", "update"]
PHASES: tuple[Phase, ...] = ("generate", "reward", "reference", "values", "update")


class Diverged(Exception):
    """The run's numbers are no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every run may spend. It goes on until all three are used up, at most `longest` times the seconds."""

    wall_s: float = math.inf
    generated_tokens: float = 0.0
    training_flops: float = 0.0
    steps: float = math.inf
    """Ends the run whatever is left of the others."""
    longest: float = 1.5
    evaluations: int = 8
    """Evaluations while `wall_s` are used up, evenly spread."""


@dataclass(kw_only=True)
class Spent:
    """What has been spent so far."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    generated_tokens: int = 0
    trained_tokens: int = 0
    flops: int = 0
    training_flops: int = 0
    """Of `flops`, those of forward and backward passes of what is optimised"""
    reward_calls: int = 0


class Ledger:
    """Seconds, tokens, FLOPs and memory of one run.

    `examine` is asked at every evaluation, off the clock, for the entries that say how good the policy has become.
    `device` says what a phase waits for before its time is taken.
    """

    def __init__(
        self,
        budget: Budget,
        device: torch.device,
        examine: Callable[[], dict[str, Any]] | None = None,
        *,
        warmup: int = 0,
    ) -> None:
        """The first `warmup` steps cost nothing."""
        self._budget, self._device, self._examine, self._warmup = budget, device, examine, warmup
        self._start_over()
        self.curve: list[dict[str, Any]] = []
        self._parts: dict[str, int] = {}
        self._optimizers: list[Optimizer] = []
        self._running: list[str] = []
        self._mark = (0.0, 0.0)
        self._not_finite = 0
        self._exhausted: set[str] = set()
        self._peak = _Peak(device)

    def _start_over(self) -> None:
        self.spent = Spent()
        self.phase_s: dict[str, float] = defaultdict(float)
        self.phase_cpu_s: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The clock runs; a phase within a phase is taken out of the outer one."""
        self._take_time()
        self._running.append(name)
        try:
            yield
        finally:
            self._take_time()
            self._running.pop()

    def _take_time(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter(), time.process_time()
        if self._running:
            wall, cpu = (new - old for new, old in zip(now, self._mark, strict=True))
            self.phase_s[self._running[-1]] += wall
            self.phase_cpu_s[self._running[-1]] += cpu
            self.spent.wall_s += wall
            self.spent.cpu_s += cpu
        self._mark = now

    def count(self, phase: Phase, flops: int = 0, *, training: bool = False, **amounts: int) -> None:
        """Add `flops` to a phase, and `amounts` to the fields of `Spent` they are named after."""
        self.flops[phase] += flops
        self.spent.flops += flops
        self.spent.training_flops += flops * training
        for name, amount in amounts.items():
            setattr(self.spent, name, getattr(self.spent, name) + amount)

    def holds(self, *optimizers: Optimizer, **parts: Iterable[nn.Module]) -> None:
        """What the run keeps in memory: modules by part (a parameter two of them share counts once), optimizers."""
        seen: set[int] = set()
        for name, modules in parts.items():
            own = [p for module in modules for p in module.parameters() if id(p) not in seen]
            seen |= {id(p) for p in own}
            self._parts[name] = sum({id(p): _bytes(p) for p in own}.values())
        self._optimizers += optimizers

    def exhausted(self, currency: str) -> None:
        """The algorithm will spend no more of this currency, so its budget is waited for no longer."""
        self._exhausted.add(currency)

    def took(self, loss: float, *norms: float) -> None:
        """A step is done. Raises Diverged after three in a row whose loss or gradient is not finite."""
        fine = math.isfinite(loss) and all(map(math.isfinite, norms))
        self._not_finite = 0 if fine else self._not_finite + 1
        if self._not_finite == 3:
            raise Diverged("loss or gradient not finite in three steps in a row")

    def steps(self) -> Iterator[int]:
        """Numbers of the steps, from 0, until the budget is used up; evaluates in between."""
        step, due = 0, 1
        self._evaluate(step)
        while not self._used_up(step):
            self._peak.begin()
            yield step
            self._peak.end()
            step += 1
            if step == self._warmup:
                self._start_over()
            share = self.spent.wall_s / self._budget.wall_s * self._budget.evaluations
            if share >= due and not self._used_up(step):
                self._evaluate(step)
                due = math.floor(share) + 1
        self._evaluate(step)

    def _used_up(self, step: int) -> bool:
        spent, budget = self.spent, self._budget
        every = all(
            name in self._exhausted or getattr(spent, name) >= getattr(budget, name)
            for name in ("wall_s", "generated_tokens", "training_flops")
        )
        return every or step >= budget.steps or spent.wall_s >= budget.longest * budget.wall_s

    def _evaluate(self, step: int) -> None:
        found = self._examine() if self._examine else {}
        self.curve.append({"step": step, **asdict(self.spent), **found})

    def memory(self) -> dict[str, Any]:
        """Bytes by part, exact for what stays from step to step, and the most there was at one time.

        `working` is what the peak has beyond those: activations, caches, scratch. On a CPU the peak is of the resident
        memory over what was resident before the first step, so it has some MiB of the C library's own.
        """
        pairs = [pair for o in self._optimizers for pair in zip(o.parameters, o.masters, strict=True)]
        states = [
            value
            for optimizer in self._optimizers
            for state in optimizer.inner.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        copies = [master for parameter, master in pairs if parameter is not master]
        parts = dict(self._parts)
        parts["optimizer"] = sum(map(_bytes, [*states, *copies]))
        parts["gradients"] = sum(_bytes(master) for _, master in pairs)
        grown = parts["optimizer"] + parts["gradients"]
        held = sum(self._parts.values())
        parts["working"] = max(0, self._peak.bytes - (grown if self._peak.relative else grown + held))
        return {"parts": parts, "peak": held + grown + parts["working"]}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Peak:
    """The most memory in use between `begin` and `end`, over all such spans.

    Of a GPU what PyTorch handed out; of a CPU the growth of the resident memory since the first span began, 0 where
    the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.relative = device.type != "cuda"
        self.bytes = 0
        self._base: int | None = None

    def begin(self) -> None:
        if not self.relative:
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError):
            if self._base is None:
                return_freed_memory()  # of the evaluation before the first step
            forget_peak()
            if self._base is None:
                self._base = resident("VmRSS")

    def end(self) -> None:
        if not self.relative:
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self._device))
        elif self._base is not None:
            self.bytes = max(self.bytes, resident("VmHWM") - self._base)
