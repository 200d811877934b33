"""What is kept of an optimizer step that was skipped: its batch and the weights, in `dumps/step-000123/`, for a replay.

Written like a checkpoint: safetensors and JSON, whole or not at all. S sequences that were trained on, P prompts,
M micro-batches of all processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from grpo_fast.config.resolve import loss_config
from grpo_fast.config.settings import TrainConfig
from grpo_fast.config.toml import to_toml
from grpo_fast.errors import UserError
from grpo_fast.models.policy import Policy
from grpo_fast.models.sharded import full
from grpo_fast.parallel.world import World
from grpo_fast.rollout import Rollout
from grpo_fast.run import checkpoint
from grpo_fast.typed import integers

KIND = "dumps"
VERSION = 1
WANTED = ("old_logprobs", "ref_logprobs", "rollout_logprobs")


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An optimizer step that was not taken, because its loss or gradient is not finite."""

    rollout: Rollout
    kept: list[int]
    """(S) the sequences of its minibatch that have signal, by their place in the rollout"""
    known: dict[str, list[Tensor]]
    """Log-probs by name, one tensor a sequence of the rollout; old and ref: of this process's sequences"""
    normalizer: float
    token_budget: int
    losses: list[Tensor]
    """(M) 0-d"""
    norm: float
    nonfinite: list[int]
    """Non-finite numbers in the gradient of each trained parameter (this process's part)"""
    lr: float


class Dumps:
    """Writes the first `run.max_dumps` of a run's skipped steps, one a step, as far as the disk has room."""

    def __init__(
        self, run_dir: Path, config: TrainConfig, policy: Policy, *, tell: Callable[[str], None]
    ) -> None:
        self._run_dir, self._config, self._policy, self._tell = run_dir, config, policy, tell

    def write(self, step: int, skipped: Skipped) -> None:
        """Say that `step` (from 1) was skipped, and keep what a replay needs; all processes call it.

        Nothing that goes wrong here ends the run.
        """
        policy, world = self._policy, self._policy.world
        counts = integers(world.gather_rows(torch.tensor([skipped.nonfinite])).sum(0).long())
        names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
        bad = {name: count for name, count in zip(names, counts, strict=True) if count}
        loss = torch.stack([loss.double().cpu() for loss in skipped.losses]).sum().item()
        self._tell(
            f"warning, step {step}: loss {loss:.4g}, gradient norm {skipped.norm:.4g}, not finite in {len(bad)} of "
            f"{len(names)} weights: this optimizer step is skipped, no weight has moved"
        )
        refusal = world.first(lambda: self._refusal(step))
        if refusal is not None:
            if refusal:
                self._tell(f"not kept for a replay: {refusal}")
            return
        known = {
            name: _of_all(world, rows, skipped.kept) for name, rows in skipped.known.items() if name in WANTED
        }
        weights = full_parameters(policy)
        groups = {"model": weights, "batch": _batch(skipped, known)}
        state = {"dump": self._facts(step, skipped, loss, bad)}

        def on_first() -> str:
            try:
                checkpoint.save(self._run_dir, step, groups, state, keep=10**6, kind=KIND)
            except UserError as error:
                return str(error)
            return ""

        path = self._run_dir / KIND / f"step-{step:06d}"
        problem = world.first(on_first)
        self._tell(
            f"not kept for a replay: {problem}" if problem else f"replay: python -m grpo_fast.replay {path}"
        )

    def _refusal(self, step: int) -> str | None:
        """Why nothing is written, empty where that needs no word; None: it is."""
        there = checkpoint.folders(self._run_dir / KIND)
        most = self._config.run.max_dumps
        if (self._run_dir / KIND / f"step-{step:06d}").exists():
            return ""
        if len(there) >= most:
            return f"there are {len(there)} dumps (run.max_dumps)" if most else ""
        needed = sum(p.numel() * p.element_size() for p in self._policy.trainable_parameters())
        newest = checkpoint.latest(self._run_dir)
        # a checkpoint is written whole before an older one goes: that much must stay free
        spare = _size(newest) if newest else 3 * needed
        free = shutil.disk_usage(self._run_dir).free
        if free < needed + spare:
            return (
                f"needs {needed / 2**20:,.1f} MiB beside {spare / 2**20:,.1f} MiB for the next checkpoint, "
                f"{free / 2**20:,.1f} MiB are free"
            )
        return None

    def _facts(self, step: int, skipped: Skipped, loss: float, bad: dict[str, int]) -> dict[str, Any]:
        config, policy = self._config, self._policy
        model = config.policy.model
        finite = [bool(loss.isfinite()) for loss in skipped.losses]
        return {
            "version": VERSION,
            "run": self._run_dir.name,
            "step": step,
            "seed": config.seed,
            "lr": skipped.lr,
            "loss": str(loss),
            "grad_norm": str(skipped.norm),
            "micro_batches": len(skipped.losses),
            "first_nonfinite_micro_batch": None if all(finite) else finite.index(False) + 1,
            "nonfinite_parameters": bad,
            "normalizer": skipped.normalizer,
            "token_budget": skipped.token_budget,
            "processes": policy.world.size,
            "device": policy.device.type,
            "dtype": str(policy.compute_dtype).removeprefix("torch."),
            "model": os.path.abspath(model) if os.path.isdir(model) else model,
            "loss_config": asdict(loss_config(config)),
            "config": to_toml(config),
        }


def _size(folder: Path) -> int:
    """Bytes of its files; 0 where it has been cleared away meanwhile."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0


def full_parameters(policy: Policy) -> dict[str, Tensor]:
    """The trained weights by name, whole, on the first process ({} on others); all call it, in the same order."""
    found: dict[str, Tensor] = {}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            whole = full(parameter)
            if policy.world.is_first:
                found[name] = whole.cpu() if policy.is_sharded else whole
    return found


def _batch(skipped: Skipped, known: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The sequences `kept` and their prompts, numbered anew in the same order."""
    rollout, kept = skipped.rollout, skipped.kept
    prompts = sorted({rollout.prompt_of[i] for i in kept})
    asked = [rollout.prompt_ids[prompt] for prompt in prompts]
    said = [rollout.completions[i].token_ids for i in kept]
    place = {prompt: index for index, prompt in enumerate(prompts)}
    return {
        "prompt_ids": _integers([token for ids in asked for token in ids]),
        "prompt_lengths": _integers([len(ids) for ids in asked]),  # (P)
        "completion_ids": _integers([token for ids in said for token in ids]),
        "completion_lengths": _integers([len(ids) for ids in said]),  # (S)
        "prompt_of": _integers([place[rollout.prompt_of[i]] for i in kept]),  # (S)
        "sequence": _integers(kept),  # (S)
        "advantages": rollout.advantages[kept].float(),  # (S)
        "losses": torch.stack([loss.cpu() for loss in skipped.losses]).double(),  # (M)
        "grad_norm": torch.tensor([skipped.norm], dtype=torch.float64),
        **{name: torch.cat([row.float().cpu() for row in rows]) for name, rows in known.items()},
    }


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _of_all(world: World, rows: list[Tensor], kept: list[int]) -> list[Tensor]:
    """The rows of the sequences `kept`, from whichever process has looked them up."""
    own = {str(i): rows[i].cpu().contiguous() for i in kept if i < len(rows) and len(rows[i])}
    if world.size > 1:
        own = {name: row for part in world.gather(save(own)) for name, row in load(part).items()}
    return [own[str(i)] for i in kept]
