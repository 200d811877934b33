"""The checks of a `TrainConfig` that need no file and no model: ranges, and settings that contradict."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from grpo_fast.errors import UserError

if TYPE_CHECKING:
    from grpo_fast.config.settings import TrainConfig


class FieldError(UserError):
    """A setting that cannot be used: `field` is its dotted name, `problem` the rest of the sentence."""

    def __init__(self, field: str, problem: str, source: str = "") -> None:
        super().__init__(f"{field} {problem}" + (f" ({source})" if source else ""))
        self.field, self.problem = field, problem


Rule = tuple[str, Callable[[Any], bool]]


def _above(bound: float) -> Rule:
    return f"> {bound}", lambda value: value > bound


def _at_least(bound: float) -> Rule:
    return f">= {bound}", lambda value: value >= bound


def _between(low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> Rule:
    def holds(value: float) -> bool:
        return (low < value if low_open else low <= value) and (value < high if high_open else value <= high)

    return f"in {'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}", holds


def _pair(rule: Rule) -> Rule:
    return f"two numbers {rule[0]}", lambda pair: all(rule[1](value) for value in pair)


# A field that is None (a loss setting left to the preset) is not looked at.
_RANGES: dict[str, Rule] = {
    "seed": _between(0, 2**32, high_open=True),
    "threads": _at_least(0),
    "policy.lora_rank": _at_least(0),
    "policy.lora_alpha": _above(0),
    "data.max_prompt_tokens": _at_least(1),
    "data.eval_size": _at_least(1),
    "reward.timeout_s": _above(0),
    "reward.workers": _at_least(1),
    "rollout.prompts_per_step": _at_least(1),
    "rollout.group_size": _at_least(2),
    "rollout.max_new_tokens": _at_least(1),
    "rollout.temperature": _above(0),
    "rollout.top_k": _at_least(0),
    "rollout.top_p": _between(0, 1, low_open=True),
    "rollout.min_p": _between(0, 1, high_open=True),
    "rollout.max_rows": _at_least(1),
    "advantage.std_floor": _at_least(0),
    "loss.clip_low": _between(0, 1),
    "loss.clip_high": _at_least(0),
    "loss.ratio_cap": _above(1),
    "loss.dual_clip": _above(1),
    "loss.sapo_tau_pos": _above(0),
    "loss.sapo_tau_neg": _above(0),
    "loss.gamma_pos": _pair(_above(0)),
    "loss.gamma_neg": _pair(_above(0)),
    "loss.kl_coef": _at_least(0),
    "loss.mismatch_low": _at_least(0),
    "loss.mismatch_high": _above(0),
    "loss.entropy_quantile": _between(0, 1, low_open=True),
    "loss.off_policy_threshold": _at_least(0),
    "loss.entropy_coef": _at_least(0),
    "optim.lr": _above(0),
    "optim.weight_decay": _at_least(0),
    "optim.betas": _pair(_between(0, 1, high_open=True)),
    "optim.eps": _above(0),
    "optim.warmup_steps": _at_least(0),
    "optim.max_grad_norm": _at_least(0),
    "optim.updates_per_rollout": _at_least(1),
    "optim.minibatches": _at_least(1),
    "optim.token_budget": _at_least(16),
    "run.steps": _at_least(1),
    "run.eval_every": _at_least(0),
    "run.save_every": _at_least(0),
    "run.keep_checkpoints": _at_least(1),
    "run.samples": _at_least(0),
    "miniature.hidden": _at_least(8),
    "miniature.layers": _at_least(1),
    "miniature.heads": _at_least(1),
    "miniature.demonstrations": _at_least(1),
    "miniature.warm_epochs": _at_least(1),
    "miniature.warm_lr": _above(0),
    "miniature.labelled": _at_least(1),
    "miniature.reward_epochs": _at_least(1),
    "miniature.reward_lr": _above(0),
    "miniature.batch_size": _at_least(1),
}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> value, in the order of the file."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            values |= flatten(value, f"{prefix}{item.name}.")
        else:
            values[prefix + item.name] = value
    return values


def check(config: TrainConfig) -> None:
    """Raises `FieldError` for the first setting that is out of range or contradicts another."""
    for name, value in flatten(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise FieldError(name, f"must be finite, got {number}")
        if value is not None and name in _RANGES:
            text, holds = _RANGES[name]
            if not holds(value):
                raise FieldError(name, f"must be {text}, got {_shown(value)}")
    _check_names(config)
    _check_rewards(config)
    _check_together(config)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_names(config: TrainConfig) -> None:
    if config.name in (".", "..") or re.search(r"[/\\\x00-\x1f]", config.name):
        raise FieldError("name", f"must be the name of one folder, got {config.name!r}")
    if not config.output_dir:
        raise FieldError("output_dir", "must name a folder, got an empty text")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise FieldError("device", f"must be auto, cpu, cuda or cuda:N, got {config.device!r}")
    if not config.data.prompt_column:
        raise FieldError("data.prompt_column", "must name a column, got an empty text")
    if not config.policy.lora_targets or not all(config.policy.lora_targets):
        raise FieldError("policy.lora_targets", "must name at least one layer, or be all-linear")
    if not all(config.rollout.stop_tokens):
        raise FieldError("rollout.stop_tokens", "must not hold an empty text")


def _check_rewards(config: TrainConfig) -> None:
    reward = config.reward
    for name, weight in reward.weights.items():
        if not math.isfinite(weight):
            raise FieldError(f"reward.weights.{name}", f"must be finite, got {weight}")
    if reward.weights and not any(reward.weights.values()):
        raise FieldError("reward.weights", "must not all be 0: nothing would be trained")
    for index, function in enumerate(reward.functions):
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", function):
            raise FieldError("reward.functions", f"must be module:function, got {function!r}")
        if function in reward.functions[:index]:
            raise FieldError("reward.functions", f"names {function} twice")
    if config.policy.model and not (reward.model or reward.functions):
        raise FieldError("reward", "needs reward.model or reward.functions when policy.model is given")


def _check_together(config: TrainConfig) -> None:
    policy, data, rollout = config.policy, config.data, config.rollout
    loss, optim = config.loss, config.optim
    if policy.model and not data.prompts:
        raise FieldError("data.prompts", f"must be given with policy.model = {policy.model!r}")
    for name, value in (("prompts", data.prompts), ("eval_prompts", data.eval_prompts)):
        if value and not policy.model:
            raise FieldError(f"data.{name}", f"needs policy.model: the miniature cannot read {value!r}")
    if config.reward.model and not policy.model:
        raise FieldError("reward.model", "needs policy.model: the miniature trains a reward model of its own")
    if data.system_prompt and not policy.model:
        raise FieldError("data.system_prompt", "needs policy.model: the miniature has no system prompts")
    truncated = {"top_k": rollout.top_k > 0, "top_p": rollout.top_p < 1, "min_p": rollout.min_p > 0}
    # No preset corrects the mismatch, so None (the preset's) is "none".
    if any(truncated.values()) and loss.mismatch in (None, "none"):
        name = next(name for name, used in truncated.items() if used)
        raise FieldError(
            f"rollout.{name}",
            "biases the probability ratio: leave it off, or set loss.mismatch to truncate, mask or "
            "sequence_mask",
        )
    low, high = loss.mismatch_low, loss.mismatch_high
    if low is not None and high is not None and low >= high:
        raise FieldError("loss.mismatch_low", f"must be < loss.mismatch_high = {high}, got {low}")
    if optim.minibatches > rollout.prompts_per_step:
        raise FieldError(
            "optim.minibatches",
            f"must be <= rollout.prompts_per_step = {rollout.prompts_per_step}, got {optim.minibatches}",
        )
    small = config.miniature
    if small.hidden % (2 * small.heads):
        raise FieldError(
            "miniature.hidden",
            f"must be a multiple of 2 * miniature.heads = {2 * small.heads}, got {small.hidden}",
        )
