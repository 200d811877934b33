"""What a run needs to go on where it stopped: weights, optimizer and step, and the evaluation before training.

Prompt order and sampling depend on the seed and the step alone; what else a loop carries from step to step (the
multipliers of rewards with a floor, the place among the prompts) goes into `carried`, name -> numbers.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grpo_fast import snapshot
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Prompt
from grpo_fast.errors import HalfUpdated, UserError
from grpo_fast.evaluate import Evaluation
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.parallel.world import ALONE, World
from grpo_fast.run import checkpoint
from grpo_fast.run.live import Run
from grpo_fast.run.lock import take_over
from grpo_fast.run.metrics import RunLogger, read_summary, write_atomically
from grpo_fast.run.saving import Saver

Carried = Mapping[str, dict[str, float]]

EVALUATION_FILE = "evaluation_before.json"


class Saving(Protocol):
    """How often a run is saved, and how much of it is kept."""

    @property
    def save_every(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...
    @property
    def save_async(self) -> bool: ...


def is_due(step: int, every: int) -> bool:
    """Whether something done `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


def goes_ahead(step: int, config: TrainConfig) -> bool:
    """Whether the rollout after `step` finished steps is begun before the step that finishes them is trained.

    Not where the weights are evaluated or saved in between: a resumed run has no older weights to generate with.
    """
    settings = config.run
    between = is_due(step, settings.eval_every) or is_due(step, settings.save_every)
    return config.rollout.ahead and step < settings.steps and not between


class Ahead(Protocol):
    """What has been generated for a step that is still to come."""

    def pending(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As tensors and plain JSON; both empty where there is nothing."""
        ...


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    keep: int,
    carried: Carried | None = None,
    world: World = ALONE,
    form: str = "sharded",
    ahead: Ahead | None = None,
    saver: Saver | None = None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Write the checkpoint of `step` finished steps; of `model` it holds what is trained (with LoRA the adapter).

    With a `saver` that writes aside this returns as soon as everything has been copied to the host. `before`: what the
    first process does where it is written, ahead of it.
    """
    tensors, plain = ahead.pending() if ahead is not None else ({}, {})
    state = {
        "step": step,
        "carried": {name: dict(numbers) for name, numbers in (carried or {}).items()},
        "ahead": plain,
    }
    saver = saver or Saver(aside=False)
    saver.wait()  # two copies at once would take twice the host's memory
    taken = snapshot.take(model, optimizer, state, world=world, form=form, copy=saver.is_aside, extra=tensors)

    def write() -> None:
        world.first(before, saving=True)
        taken.write(run_dir, step, keep=keep, world=world)

    saver.write(write)


@dataclass(frozen=True)
class Restored:
    """Where a run goes on."""

    step: int
    """Finished steps"""
    tensors: dict[str, Tensor]
    plain: dict[str, Any]
    """What was generated ahead, as `Ahead.pending` gave it"""


def restore(
    run_dir: Path,
    model: nn.Module,
    optimizer: Optimizer,
    carried: Carried | None = None,
    *,
    world: World = ALONE,
) -> Restored:
    """Load the newest checkpoint, if there is one.

    The dicts of `carried` are filled with what was saved under their names.
    """
    newest = world.first(lambda: str(checkpoint.latest(run_dir) or ""))
    if not newest:
        return Restored(0, {}, {})
    tensors, state = snapshot.put_back(Path(newest), model, optimizer, world)
    for name, numbers in (carried or {}).items():
        numbers.update(state["carried"].get(name, {}))
    return Restored(int(state["step"]), tensors, state.get("ahead", {}))


def check_data(known: dict[str, float], **prompts: Sequence[Prompt]) -> None:
    """UserError where a run is to go on with other prompts than it began with; its checkpoints carry `known`."""
    for name, those in prompts.items():
        found = float(zlib.crc32("\0".join(prompt.text for prompt in those).encode(errors="replace")))
        if known.setdefault(name, found) != found:
            raise UserError(
                f"the {name} prompts are not those that the run began with: put the files back as they were "
                "(data.prompts, data.eval_prompts), or begin a new run"
            )


class Steps:
    """The steps of a run, each logged and saved when it is due; a context manager, iterated once.

    Checkpoints are written by a thread (with `save_async`): a step waits for the copy to the host, and for the
    checkpoint before, if that is not through. A UserError on the way (a reward function that fails, a full disk) costs
    no step that the model has taken.
    """

    def __init__(
        self,
        run: Run,
        settings: Saving,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        steps: int,
        first: int,
        carried: Carried | None = None,
        ahead: Ahead | None = None,
        form: str = "sharded",
    ) -> None:
        """`steps` in all, `first` of which an earlier process has taken."""
        self._run, self._settings, self._steps = run, settings, steps
        self._model, self._optimizer, self._carried, self._ahead = model, optimizer, carried, ahead
        self._form = form
        self._saver = Saver(aside=settings.save_async)
        self._writing = first  # the step that the saver has been given last
        self.done = self._logged = self._saved = first
        self._refused = False  # whether the disk did not take the last checkpoint
        self._metrics: dict[str, float] = {}

    def __enter__(self) -> "Steps":
        return self

    def __iter__(self) -> Iterator[int]:
        while self.done < self._steps:
            yield self.done

    def taken(self, metrics: dict[str, float]) -> int:
        """The model has taken another step; returns their number. `metrics` may still grow until `finish`."""
        self.done += 1
        self._metrics = metrics
        return self.done

    def finish(self, *, last: bool = False) -> None:
        """Log the step, and save it when that is due, at the end, and where the run is to stop (`last`)."""
        self._log()
        last = last or self.done == self._steps or self._run.stop_requested
        if last or is_due(self.done, self._settings.save_every):
            self._save()
        elif self._run.world.size == 1 and self._saver.failed():  # several must find out at the same step
            self._settle()
        if last:
            self._settle()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            error = UserError(
                "out of memory outside a micro-batch: lower reward models' or rollouts' share (rollout.max_rows, "
                "engine.sleep), or give the run a memory.limit_gib to fit into"
            )
        if not isinstance(error, UserError):
            self._saver.close()
            return
        if self._run.world.size > 1 and not error.agreed:
            raise error  # the others are somewhere else: nothing can be done together any more
        if self.done > self._logged:
            self._log()
        with suppress(UserError):  # it is on its way already
            self._settle()
        if self.done > self._saved and not self._refused and not isinstance(error, HalfUpdated):
            self._ahead = None  # what fails may be just that
            self._save()
            self._settle()
        self._saver.close()
        if self._saved:
            hint = f"{self._saved} steps are kept, go on with --resume {self._run.path}"
            raise UserError(f"{error}; {hint}") from error
        raise error

    def _log(self) -> None:
        self._logged = self.done  # once, even where the disk refuses
        self._run.step(self.done, self._metrics)

    def _save(self) -> None:
        with self._run.phase_timer("save"):
            self._settle()
            self._refused = True
            self._writing = self.done
            save(
                self._run.path,
                self.done,
                self._model,
                self._optimizer,
                keep=self._settings.keep_checkpoints,
                carried=self._carried,
                world=self._run.world,
                form=self._form,
                ahead=self._ahead,
                saver=self._saver,
                before=self._run.logger.sync,
            )
            self._refused = False

    def _settle(self) -> None:
        """The checkpoint that is being written is on the disk, or its error is raised."""
        try:
            self._saver.wait()
        except UserError:
            self._refused = True
            raise
        if not self._refused:
            self._saved = self._writing


def resumed_logger(
    run_dir: Path,
    *,
    phase: str,
    longer: str,
    steps: int,
    config_toml: str | None = None,
    wandb_project: str | None = None,
) -> RunLogger:
    """Reopen a run's folder at the point its files allow to go on from.

    `phase` is what its checkpoints are of. UserError when it has taken its `steps` steps already; `longer` is the flag
    that makes it go on.
    """
    lock = take_over(run_dir)
    path = checkpoint.latest(run_dir)
    if path is not None:
        checkpoint.check(path)
        step = int(path.name.removeprefix("step-"))
        if step > steps or (step == steps and (read_summary(run_dir) or {}).get("status") == "finished"):
            state = "is finished" if step == steps else "has gone further than asked for"
            raise UserError(
                f"run {run_dir} {state}, {step} steps of {steps}: give more with {longer} to train it further"
            )
    elif (run_dir / EVALUATION_FILE).is_file():
        step = 0
    elif (run_dir / "reward_model" / "quality.json").is_file():
        phase, step = "reward_model", 10**9
    elif (run_dir / "start" / "config.json").is_file():
        phase, step = "warm_start", 10**9
    else:
        phase, step = "warm_start", 0
    return RunLogger.resume(
        run_dir, phase=phase, step=step, config_toml=config_toml, wandb_project=wandb_project, lock=lock
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
        return Evaluation.of(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(
            f"{path} is damaged: without the evaluation before training nothing can be compared; start the run anew"
        ) from None
