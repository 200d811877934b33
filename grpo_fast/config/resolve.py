"""What the settings mean on this machine and for the kernels: device, dtype, loss, advantage, folder."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from grpo_kernels import LossConfig
from grpo_kernels.group_advantages import Mode, Scale

from grpo_fast.config.reward_settings import RewardConfig
from grpo_fast.config.rules import FieldError
from grpo_fast.config.settings import TrainConfig
from grpo_fast.errors import UserError
from grpo_fast.parallel.world import local_rank

# What a preset's paper divides and compares by, where that is not our default.
_PRESET_ADVANTAGE: dict[str, tuple[Mode, Scale]] = {
    "dr_grpo": ("scalarized", "none"),
    "rloo": ("leave_one_out", "none"),
    "reinforce_pp": ("scalarized", "batch"),
}

# Devices on which compiled layers measured faster by more than compiling costs (benchmarks.body): none yet. On a CPU
# the products dominate (0.94 and 1.06 times the speed of plain layers); CUDA is unmeasured.
_COMPILE_PAYS: frozenset[str] = frozenset()


def loss_config(config: TrainConfig) -> LossConfig:
    """The preset with the given fields replaced.

    Raises `FieldError` when they make no loss together.
    """
    given = {
        name: value
        for name, value in vars(config.loss).items()
        if name not in ("preset", "mask_truncated") and value is not None
    }
    try:
        return LossConfig.preset(config.loss.preset, **given)
    except (TypeError, ValueError) as error:
        name, _, problem = str(error).partition(" ")  # the kernels' messages begin with the field
        raise FieldError(f"loss.{name}", problem) from None


def advantage_choice(config: TrainConfig) -> tuple[Mode, Scale]:
    """Mode and scale for `group_advantages`, `auto` replaced by the loss preset's own."""
    mode, scale = _PRESET_ADVANTAGE.get(config.loss.preset, ("gdpo", "group"))
    chosen = config.advantage
    return (mode if chosen.mode == "auto" else chosen.mode, scale if chosen.scale == "auto" else chosen.scale)


def mismatch_limit(config: TrainConfig) -> float:
    """KL divergence between engine and trainer that stops a run; 0: none does.

    Truncated sampling draws from another distribution on purpose, however far away that is.
    """
    if config.engine.max_mismatch is not None:
        return config.engine.max_mismatch
    return 0.0 if config.rollout.truncates else 0.1


def constant_normalizer(config: TrainConfig, sequences: int) -> float:
    """What `aggregation = "constant"` divides a step's summed token losses by.

    `sequences` counts the completions of the whole optimizer step. Dr. GRPO (arXiv 2503.20783) divides by
    the token limit for each of them; LUSPO, whose loss is weighted by length, by their number.
    """
    return float(sequences * (1 if config.loss.preset == "luspo" else config.rollout.max_new_tokens))


def device_named(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; raises `FieldError` when it is not here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    place = local_rank()  # of several processes on this machine each takes a device of its own
    own = "cuda" if place is None else f"cuda:{place}"
    device = torch.device((own if count else "cpu") if name == "auto" else own if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} CUDA device{'s' * (count > 1)}" if count else "no CUDA device"
        raise FieldError("device", f"is {name}, but PyTorch finds {found}; use auto or cpu")
    return device


def resolve_device(config: TrainConfig) -> torch.device:
    """The device asked for; raises `FieldError` when it is not here, or lacks what the policy's settings need."""
    device = device_named(config.device)
    if config.policy.liger and device.type != "cuda":
        raise FieldError("policy.liger", f"needs a CUDA device, the run is on {device.type}; leave it off")
    if config.engine.cuda_graphs == "on" and device.type != "cuda":
        raise FieldError(
            "engine.cuda_graphs", f"needs a CUDA device, the run is on {device.type}; use auto or off"
        )
    for name, on in (
        ("optimizer", config.memory.optimizer != "device"),
        ("activations_on_host", config.memory.activations_on_host),
    ):
        if on and device.type != "cuda":
            raise FieldError(
                f"memory.{name}", f"needs a CUDA device: the run is on {device.type}, in the host's memory"
            )
    if config.policy.compile == "on" and (missing := _missing_compiler(device)):
        raise FieldError("policy.compile", f"needs a compiler, and there is no {missing}; leave it off")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    backend = config.policy.backend
    if backend in ("triton", "fused") and device.type != "cuda" and not interpreted:
        raise FieldError("policy.backend", f"{backend} needs a CUDA device; use auto or torch")
    return device


def select_device(config: TrainConfig) -> None:
    """Make the run's device the current one: streams, graphs and kernels belong to that."""
    device = resolve_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def check_packages(config: TrainConfig) -> None:
    """Raises `FieldError` for a setting whose package is not installed; the packages are not imported."""
    for name, value, package in (
        ("optim.optimizer", config.optim.optimizer == "adamw8bit" and "adamw8bit", "torchao"),
        ("policy.quantize", config.policy.quantize == "nf4" and "nf4", "bitsandbytes"),
    ):
        if value and find_spec(package) is None:
            raise FieldError(name, f"{value} needs the package {package}: pip install 'grpo-fast[lowbit]'")


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether the policy's layers are compiled on this device; `auto` leaves them where there is no compiler."""
    if config.policy.compile != "auto":
        return config.policy.compile == "on"
    return device.type in _COMPILE_PAYS and not config.policy.liger and not _missing_compiler(device)


def _missing_compiler(device: torch.device) -> str:
    """What torch.compile needs and this machine lacks, empty where it has all.

    For the CPU it writes C++; on a CUDA device Triton builds the launchers of its kernels with a C compiler.
    """
    if device.type == "cpu":
        variable, usual = "CXX", ("clang++" if sys.platform == "darwin" else "g++",)
    else:
        variable, usual = "CC", ("gcc", "clang")
    named = os.environ.get(variable, "").split()[:1] or usual  # without the flags that may follow
    return "" if any(map(shutil.which, named)) else f"{' or '.join(named)} ({variable} names another)"


def resolve_dtype(config: TrainConfig | RewardConfig, device: torch.device) -> torch.dtype:
    """Compute type on this device; master weights are float32 whatever it is."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def run_path(config: TrainConfig) -> Path:
    """Folder of a new training run (`run_folder`)."""
    return run_folder(config.output_dir, config.name, config.policy.model or "miniature")


def run_folder(output_dir: str, name: str, model: str) -> Path:
    """Folder of a new run, not yet made: `name`, or one made from the model's name and the time.

    Raises `UserError` when the name is given and its folder exists: nothing on disk is overwritten.
    """
    folder = Path(output_dir)
    if name:
        if (folder / name).exists():
            raise UserError(
                f"run folder {folder / name} already exists: choose another --name, or go on with "
                f"--resume {folder / name}"
            )
        return folder / name
    stem = f"{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = (folder / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def overlaps(config: TrainConfig, device: torch.device) -> bool:
    """Whether finished groups are scored while others are still generated."""
    return config.reward.overlap == "on" or (config.reward.overlap == "auto" and device.type == "cuda")


def check_paths(config: TrainConfig) -> None:
    """Raises `FieldError` for a model folder that is not there; hub ids pass unasked."""
    named = [("policy.model", config.policy.model)] if config.policy.model else []
    named += [("reward.model", split_name(spec)[1]) for spec in config.reward.model]
    for name, value in named:
        path = Path(value)
        if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            continue
        if path.is_dir():
            raise FieldError(name, f"is the folder {value}, which has no config.json")
        if path.exists():
            raise FieldError(name, f"must be the folder of a model, got the file {value}")
        if value.startswith((".", "/", "~")) or value.count("/") > 1:
            raise FieldError(name, f"must be the folder of a model, {value} does not exist")


def split_name(spec: str) -> tuple[str, str]:
    """`name=path` of `reward.model` as (name, path); ("", path) without a name."""
    match = re.match(r"([\w-]+)=(.+)", spec)
    return (match[1], match[2]) if match else ("", spec)
