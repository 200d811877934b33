"""What a run needs to go on where it stopped: weights, optimizer and step, and the evaluation before training.

Prompt order and sampling depend on the seed and the step alone, so there is nothing else to save.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from grpo_fast.config.settings import TrainConfig
from grpo_fast.errors import UserError
from grpo_fast.evaluate import Evaluation
from grpo_fast.models.policy import Policy
from grpo_fast.optim import Optimizer
from grpo_fast.run import checkpoint
from grpo_fast.run.live import Run
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


class Steps:
    """The steps of a run, each logged and saved when it is due; a context manager, iterated once.

    A UserError on the way (a reward function that fails, a full disk) costs no step that the policy has taken.
    """

    def __init__(
        self, run: Run, config: TrainConfig, policy: Policy, optimizer: Optimizer, first: int
    ) -> None:
        """`first`: steps that an earlier process has taken."""
        self._run, self._settings = run, config.run
        self._policy, self._optimizer = policy, optimizer
        self.done = self._logged = self._saved = first
        self._refused = False  # whether the disk did not take the last checkpoint
        self._metrics: dict[str, float] = {}

    def __enter__(self) -> "Steps":
        return self

    def __iter__(self) -> Iterator[int]:
        while self.done < self._settings.steps:
            yield self.done

    def taken(self, metrics: dict[str, float]) -> int:
        """The policy has taken another step; returns their number. `metrics` may still grow until `finish`."""
        self.done += 1
        self._metrics = metrics
        return self.done

    def finish(self) -> None:
        """Log the step, and save it when that is due, at the end, and where the run is to stop."""
        self._log()
        every = self._settings.save_every
        if (
            self.done == self._settings.steps
            or self._run.stop_requested
            or (every and self.done % every == 0)
        ):
            self._save()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, UserError):
            return
        if self.done > self._logged:
            self._log()
        if self.done > self._saved and not self._refused:
            self._save()
        if self._saved:
            hint = f"{self._saved} steps are kept, go on with --resume {self._run.path}"
            raise UserError(f"{error}; {hint}") from error

    def _log(self) -> None:
        self._logged = self.done  # once, even where the disk refuses
        self._run.step(self.done, self._metrics)

    def _save(self) -> None:
        self._refused = True
        with self._run.phase_timer("save"):
            save(
                self._run.path, self.done, self._policy, self._optimizer, keep=self._settings.keep_checkpoints
            )
        self._refused, self._saved = False, self.done


def resumed_logger(
    run_dir: Path, *, steps: int, config_toml: str | None = None, wandb_project: str | None = None
) -> RunLogger:
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
    return RunLogger.resume(
        run_dir, phase=phase, step=step, config_toml=config_toml, wandb_project=wandb_project
    )


def save_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """Keep the evaluation before training for the comparison at the end."""
    write_atomically(run_dir / EVALUATION_FILE, json.dumps(asdict(evaluation), allow_nan=False))


def saved_evaluation(run_dir: Path) -> Evaluation | None:
    """What `save_evaluation` wrote, None when it has not been measured yet."""
    path = run_dir / EVALUATION_FILE
    if not path.is_file():
        return None
    try:
        return Evaluation(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(
            f"{path} is damaged: without the evaluation before training nothing can be compared; start the run anew"
        ) from None
