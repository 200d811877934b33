"""What a run needs to go on where it stopped: weights, optimizer and step, and the evaluation before training.

Prompt order and sampling depend on the seed and the step alone, so there is nothing else to save.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from grpo_fast.errors import UserError
from grpo_fast.evaluate import Evaluation
from grpo_fast.models.policy import Policy
from grpo_fast.optim import Optimizer
from grpo_fast.run import checkpoint
from grpo_fast.run.metrics import RunLogger, read_summary, write_atomically

EVALUATION_FILE = "evaluation_before.json"


def save(run_dir: Path, step: int, policy: Policy, optimizer: Optimizer, *, keep: int) -> None:
    """Write the checkpoint of `step` finished steps; with LoRA it holds the adapter alone."""
    trained = {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    moments, plain = checkpoint.flatten_optimizer(state["inner"])
    checkpoint.save(
        run_dir,
        step,
        {"model": trained, "optimizer": moments, "masters": state["masters"]},
        {"step": step, "optimizer": plain, "skipped_steps": state["skipped_steps"]},
        keep=keep,
    )


@torch.no_grad()
def restore(run_dir: Path, policy: Policy, optimizer: Optimizer) -> int:
    """Load the newest checkpoint, if there is one, and return the number of finished steps."""
    path = checkpoint.latest(run_dir)
    if path is None:
        return 0
    groups, state = checkpoint.load(path, policy.device)
    own = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    for name, parameter in own.items():
        saved = groups["model"].get(name)
        if saved is None or saved.shape != parameter.shape:
            found = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
            raise UserError(
                f"checkpoint {path}: weight {name} {found}, the policy has {tuple(parameter.shape)}"
            )
        parameter.copy_(saved)
    optimizer.load_state_dict(
        {
            "inner": checkpoint.unflatten_optimizer(groups["optimizer"], state["optimizer"]),
            "masters": groups["masters"],
            "skipped_steps": state["skipped_steps"],
        }
    )
    return int(state["step"])


def resumed_logger(run_dir: Path, *, steps: int, wandb_project: str | None) -> RunLogger:
    """Reopen a run's folder at the point its files allow to go on from; UserError when its `steps` are done."""
    path = checkpoint.latest(run_dir)
    if path is not None:
        if problem := checkpoint.verify(path):
            checkpoint.load(path)  # raises with the way out
            raise AssertionError(problem)
        phase, step = "grpo", int(path.name.removeprefix("step-"))
        if step >= steps and (read_summary(run_dir) or {}).get("status") == "finished":
            raise UserError(
                f"run {run_dir} is finished, {step} steps of {steps}: give more with --run.steps to train it further"
            )
    elif (run_dir / EVALUATION_FILE).is_file():
        phase, step = "grpo", 0
    elif (run_dir / "reward_model" / "quality.json").is_file():
        phase, step = "reward_model", 10**9
    elif (run_dir / "start" / "config.json").is_file():
        phase, step = "warm_start", 10**9
    else:
        phase, step = "warm_start", 0
    return RunLogger.resume(run_dir, phase=phase, step=step, wandb_project=wandb_project)


def save_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """Keep the evaluation before training for the comparison at the end."""
    write_atomically(run_dir / EVALUATION_FILE, json.dumps(asdict(evaluation), allow_nan=False))


def saved_evaluation(run_dir: Path) -> Evaluation | None:
    """What `save_evaluation` wrote, None when it has not been measured yet."""
    path = run_dir / EVALUATION_FILE
    return Evaluation(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
