"""From a command line and a TOML file to a command's configuration.

Values come from the defaults, then the file of `--config`, then the flags, each over the one before; tyro renders
`--help` from the dataclasses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from grpo_fast.config.completion import completion
from grpo_fast.config.flags import from_words, one_path, split, take_flag
from grpo_fast.config.reward_settings import RewardConfig
from grpo_fast.config.rules import FieldError
from grpo_fast.config.schema import COMMAND_LINE, SPECIAL, Schema, convert
from grpo_fast.config.settings import TrainConfig
from grpo_fast.config.toml import read_toml, tables
from grpo_fast.errors import UserError

Config = TypeVar("Config", TrainConfig, RewardConfig)


@dataclass(frozen=True, kw_only=True)
class Invocation(Generic[Config]):
    """What the command line asks for."""

    config: Config
    dry_run: bool
    resume: Path | None
    watch: Path | None = None
    """A run to be looked at: nothing is trained then."""


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Config]):
    """A command's settings and what is special about them."""

    module: str
    program: str
    """Name under which it is installed."""
    schema: Schema
    help: type
    """The configuration with the flags that are no settings, for `--help`."""
    resumable: tuple[str, ...]
    """What may change when a run goes on: how long and where, not what is computed."""
    adapt: Callable[[dict[str, Any]], None]
    """Puts defaults that depend on other settings beside the values that were given."""


@dataclass(frozen=True, kw_only=True)
class _Special:
    config: str = ""
    """TOML file with settings; flags given beside it win."""
    dry_run: bool = False
    """Load and check everything, print the plan, stop."""
    resume: str = ""
    """Folder of an interrupted run: go on from its last checkpoint with its settings."""
    watch: str = ""
    """Folder of a run, going on or over: show it live and train nothing."""
    print_completion: Literal["", "bash", "zsh", "fish"] = ""
    """Print what makes this shell complete the flags of the installed command, and stop."""


@dataclass(frozen=True, kw_only=True)
class _TrainHelp(_Special, TrainConfig):
    """Align a language model on several objectives at once with Group Relative Policy Optimization.

    Without an argument: the miniature, which downloads nothing and takes minutes on a CPU. Every flag is
    also a key of the TOML file: --optim.lr is lr under [optim]. One weight alone: --reward.weights.NAME 2;
    none of a file's weights: --reward.weights with nothing after it.
    """


@dataclass(frozen=True, kw_only=True)
class _RewardHelp(_Special, RewardConfig):
    """Train a reward model that rates a reply on every objective at once, and measure how far it can be trusted.

    Without an argument: the miniature's reward model, in about a minute on a CPU. Every flag is also a key of
    the TOML file: --optim.lr is lr under [optim].
    """


def _adapt_train(chosen: dict[str, Any]) -> None:
    if chosen.get("policy.model"):
        # The defaults suit a small model trained from scratch; these two would harm a real one.
        chosen.setdefault("optim.lr", 1e-5 if chosen.get("policy.lora_rank") else 1e-6)
        chosen.setdefault("rollout.max_new_tokens", 256)


def _adapt_reward(chosen: dict[str, Any]) -> None:
    if chosen.get("backbone.model"):
        chosen.setdefault("optim.lr", 1e-4 if chosen.get("backbone.lora_rank") else 1e-5)


TRAIN: Command[TrainConfig] = Command(
    module="grpo_fast.train",
    program="grpo-fast",
    schema=Schema(
        TrainConfig,
        elsewhere={
            "learning_rate": "optim.lr",
            "beta": "loss.kl_coef",
            "epsilon": "loss.clip_low",
            "epsilon_high": "loss.clip_high",
            "num_generations": "rollout.group_size",
            "max_completion_length": "rollout.max_new_tokens",
            "max_prompt_length": "data.max_prompt_tokens",
            "max_steps": "run.steps",
            "num_iterations": "optim.updates_per_rollout",
            "reward_funcs": "reward.functions",
            "reward_weights": "reward.weights",
            "loss_type": "loss.preset",
            "scale_rewards": "advantage.scale",
            "dataset_name": "data.prompts",
            "model_name_or_path": "policy.model",
            "dir": "output_dir",
            "run_name": "name",
            "lora_r": "policy.lora_rank",
            "lora_target_modules": "policy.lora_targets",
        },
    ),
    help=_TrainHelp,
    resumable=(
        "run.",
        "limits.",
        "device",
        "threads",
        "reward.timeout_s",
        "reward.workers",
        "rollout.max_rows",
        "optim.token_budget",
        "policy.backend",
        "policy.liger",
        "memory.",
        "engine.",
        "policy.compile",
        "policy.attention",
        "policy.gradient_checkpointing",
    ),
    adapt=_adapt_train,
)

TRAIN_REWARD: Command[RewardConfig] = Command(
    module="grpo_fast.train_reward",
    program="grpo-fast-reward",
    schema=Schema(
        RewardConfig,
        elsewhere={
            "learning_rate": "optim.lr",
            "dataset_name": "data.ratings",
            "train_file": "data.ratings",
            "model_name_or_path": "backbone.model",
            "num_train_epochs": "run.epochs",
            "per_device_train_batch_size": "optim.batch_size",
            "max_length": "data.max_tokens",
            "center_rewards_coefficient": "loss.center_coef",
            "dir": "output_dir",
            "run_name": "name",
            "lora_r": "backbone.lora_rank",
            "lora_target_modules": "backbone.lora_targets",
        },
    ),
    help=_RewardHelp,
    resumable=("run.", "device", "threads", "optim.token_budget"),
    adapt=_adapt_reward,
)


def parse(argv: Sequence[str] | None = None, command: Command[Config] = TRAIN) -> Invocation[Config]:
    """Reads the command line (`sys.argv` by default).

    Raises `UserError` with one line for whatever cannot be used. `--help` and `--print-completion` print and exit with
    code 0.
    """
    words_given = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words_given or "--help" in words_given:
        import tyro  # 0.15 s, and only needed here

        tyro.cli(command.help, args=["--help"], prog=f"python -m {command.module}")
    flags = split(words_given, command.schema)
    special = {name: values for name, values in flags if name in SPECIAL}
    if "print_completion" in special:
        print(completion(command.program, command.help, " ".join(special["print_completion"])), end="")
        sys.exit(0)
    watch = one_path(special, "watch")
    if watch and len(flags) > 1:
        raise UserError(f"--watch {watch} stands alone: it shows a run and changes none of its settings")
    dry_run = convert(from_words(special.get("dry_run", ["false"]), bool), bool, "dry_run", COMMAND_LINE)
    resume = one_path(special, "resume")
    recipe = one_path(special, "config")
    if resume and recipe:
        raise UserError("--config cannot be given with --resume: a run goes on with its own config.toml")
    if resume:
        recipe = resume / "config.toml"
        if not recipe.is_file():
            found = "has no config.toml" if resume.is_dir() else "does not exist"
            raise UserError(f"--resume must be the folder of a run, {resume} {found}")
        if not recipe.stat().st_size:
            raise UserError(f"{recipe} is empty: put the run's settings back, or begin a new run")
        if sections := set(tables(recipe)) - command.schema.sections:
            raise UserError(
                f"--resume {resume}: its config.toml has [{min(sections)}], so it is a run of another command than "
                f"{command.module}"
            )

    values: dict[str, tuple[Any, str]] = read_toml(recipe, command.schema) if recipe else {}
    for name, words in flags:
        if name in special:
            continue
        if resume and not name.startswith(command.resumable):
            raise UserError(
                f"--{name} cannot be given with --resume: a run goes on with its own settings; what may change is "
                f"{', '.join(command.resumable)}"
            )
        take_flag(values, name, words, command.schema)
    return Invocation(config=_build(values, command), dry_run=dry_run, resume=resume, watch=watch)


def _build(values: dict[str, tuple[Any, str]], command: Command[Config]) -> Config:
    """The defaults with `values`, dotted name -> (value, where it was given), put over them."""
    chosen = {name: value for name, (value, _) in values.items()}
    command.adapt(chosen)
    top = {name: value for name, value in chosen.items() if "." not in name}
    defaults = command.schema.config()
    for section in command.schema.sections:
        inside = {
            name.split(".")[1]: value for name, value in chosen.items() if name.startswith(section + ".")
        }
        if inside:
            top[section] = replace(getattr(defaults, section), **inside)
    try:
        return command.schema.config(**top)
    except FieldError as error:
        given = [name for name in values if error.field == name or error.field.startswith(name + ".")]
        raise FieldError(error.field, error.problem, values[given[0]][1] if given else "") from None
