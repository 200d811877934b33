"""Token budget, checkpointing and rows in flight that fit a limit; where none do, what is too large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo_fast.memory.estimate import MemoryEstimate, Planner
from grpo_fast.models.lora import LoraSettings

GIB = 2**30
LEAST_BUDGET = 256
"""Tokens; smaller micro-batches save next to nothing more"""
LEAST_ROWS = 8
WITHOUT_CHECKPOINTING = 4
"""Checkpointing (a third more work) is switched on only where a budget this many times smaller does not fit either"""
NF4_BYTES = 0.5 + 1 / 64 + 4 / 16384
"""A 4-bit weight's: four bits, an 8-bit scale for 64 of them, and a float32 scale for 256 of those."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings, and the memory they need."""

    token_budget: int
    gradient_checkpointing: bool
    max_rows: int
    estimate: MemoryEstimate

    def flags(self, planner: Planner) -> str:
        """The flags of what differs from what was asked for; empty: nothing."""
        asked = planner.work
        parts = []
        if self.token_budget != asked.token_budget:
            parts.append(f"--optim.token_budget {self.token_budget}")
        if self.gradient_checkpointing != asked.gradient_checkpointing:
            parts.append("--policy.gradient_checkpointing true")
        if self.max_rows != asked.max_rows:
            parts.append(f"--rollout.max_rows {self.max_rows}")
        return " ".join(parts)


def as_asked(planner: Planner) -> Choice:
    """The settings as they were given."""
    work = planner.work
    return Choice(
        token_budget=work.token_budget,
        gradient_checkpointing=work.gradient_checkpointing,
        max_rows=work.max_rows,
        estimate=planner.estimate(),
    )


def choose(planner: Planner, limit: int) -> Choice | None:
    """The first settings, from those asked for downwards, whose peak is at most `limit` bytes; None: there are none.

    The order is such that a larger limit never gives a smaller budget or fewer rows.
    """
    rows = next(
        (n for n in _halved(planner.work.max_rows, LEAST_ROWS) if _without_update(planner, n) <= limit), None
    )
    if rows is None:
        return None
    for budget, checkpointing in _updates(planner):
        changes = {"token_budget": budget, "gradient_checkpointing": checkpointing, "max_rows": rows}
        found = planner.estimate(**changes)
        if found.peak <= limit:
            return Choice(**changes, estimate=found)
    return None


def _updates(planner: Planner) -> Iterator[tuple[int, bool]]:
    """Budgets and checkpointing, the best first and the smallest last."""
    work = planner.work
    # A row holds at least one sequence, whatever the budget, and at most what a step trains on.
    least = max(LEAST_BUDGET, work.prompt_tokens + work.new_tokens - 1)
    budgets = list(_halved(work.token_budget, least))
    if not work.gradient_checkpointing:
        plain = [budget for budget in budgets if budget * WITHOUT_CHECKPOINTING >= work.token_budget]
        yield from ((budget, False) for budget in plain)
        budgets = [budget for budget in budgets if budget <= plain[-1]]
    yield from ((budget, True) for budget in budgets)


def _halved(value: int, least: int) -> Iterator[int]:
    """`value` and its halves, the last one at least `least` (or `value` itself)."""
    yield value
    while value // 2 >= least:
        value //= 2
        yield value


def _without_update(planner: Planner, rows: int) -> int:
    """Peak of generating and scoring, heap and all, with the smallest update."""
    budget, checkpointing = list(_updates(planner))[-1]
    found = planner.estimate(max_rows=rows, token_budget=budget, gradient_checkpointing=checkpointing)
    return max(found.generate, found.score)


def refusal(planner: Planner, limit: int, where: str) -> str:
    """The line for settings that do not fit: what is needed, what there is, and the nearest that fits."""
    needed = planner.estimate()
    phase, peak = max(needed.phases().items(), key=lambda item: item[1])
    line = f"these settings need {gib(peak)} ({phase}), {where} has {gib(limit)}"
    found = choose(planner, limit)
    if found is not None:
        return f"{line}; this fits, with {gib(found.estimate.peak)}: {found.flags(planner)}"
    smallest = smallest_estimate(planner)
    part, size = max(smallest.parts().items(), key=lambda item: item[1])
    line += f"; the least of budget, checkpointing and rows needs {gib(smallest.peak)}, most of it {part} ({gib(size)})"
    return f"{line}; {_way_out(planner, limit)}"


def smallest_estimate(planner: Planner) -> MemoryEstimate:
    """The least that budget, checkpointing and rows can do."""
    budget, checkpointing = list(_updates(planner))[-1]
    rows = list(_halved(planner.work.max_rows, LEAST_ROWS))[-1]
    return planner.estimate(token_budget=budget, gradient_checkpointing=checkpointing, max_rows=rows)


def _way_out(planner: Planner, limit: int) -> str:
    """The first change of method that fits, with its flags."""
    work = planner.work
    on_gpu, full = work.device == "cuda", work.lora is None
    steps: list[tuple[str, str, dict[str, Any]]] = []
    # What costs least in speed or in what is trained comes first.
    if on_gpu and work.engine and not (work.engine_sleeps or work.ahead):
        asleep = {"engine_sleeps": True}
        steps.append(("with the engine's cache freed while training", "--engine.sleep", asleep))
        parked = {**asleep, "optimizer_parked": True}
        flags = "--engine.sleep --memory.optimizer while_training"
        steps.append(("with the optimizer off the GPU while generating", flags, parked))
    if full and work.reference:
        steps.append(("without a reference", "--loss.kl_coef 0", {"reference": False}))
    plain = {"reference": False} if full else {}
    no_kl = " --loss.kl_coef 0" if full and work.reference else ""
    if full and not work.factored:
        if work.state_bytes > 4:
            eight = {**plain, "state_bytes": 2.03}
            steps.append(("with an optimizer in 8 bits", f"--optim.optimizer adamw8bit{no_kl}", eight))
        small = {**plain, "factored": True}
        steps.append(("with a smaller optimizer", f"--optim.optimizer adafactor{no_kl}", small))
    if on_gpu and full and not work.optimizer_on_host:
        host = {**plain, "optimizer_on_host": True}
        steps.append(("with the optimizer on the host", f"--memory.optimizer host{no_kl}", host))
    if full:
        adapter = {"lora": LoraSettings(rank=16), "reference": False}
        steps.append(("training an adapter", "--policy.lora_rank 16", adapter))
    if work.frozen_bytes is None:
        four = {"lora": work.lora or LoraSettings(rank=16), "reference": False, "frozen_bytes": NF4_BYTES}
        flags = ("--policy.lora_rank 16 " if full else "") + "--policy.quantize nf4"
        steps.append(("training an adapter on 4-bit weights", flags, four))
    for what, flags, changes in steps:
        other = planner.changed(**changes)
        found = choose(other, limit)
        if found is not None:
            more = found.flags(other)
            return f"{what} it fits, with {gib(found.estimate.peak)}: {flags}{' ' + more if more else ''}"
    return "take a smaller model or reward model, shorter sequences, or a larger device"


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:.3g} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"
