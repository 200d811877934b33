"""The checks of a `TrainConfig` that need no file and no model: ranges, and settings that contradict."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from grpo_fast.config.check_engine import check_address, check_engine
from grpo_fast.config.rules import (
    FieldError,
    Rule,
    above,
    at_least,
    between,
    check_common,
    check_ranges,
    pair,
)

if TYPE_CHECKING:
    from grpo_fast.config.settings import TrainConfig

_RANGES: dict[str, Rule] = {
    "seed": between(0, 2**32, high_open=True),
    "threads": at_least(0),
    "policy.lora_rank": at_least(0),
    "policy.lora_alpha": above(0),
    "data.max_prompt_tokens": at_least(1),
    "data.eval_size": at_least(1),
    "reward.overlong_buffer": at_least(0),
    "reward.floor_lr": above(0),
    "reward.timeout_s": above(0),
    "reward.workers": at_least(1),
    "reward.memory_limit_gib": at_least(0),
    "judge.timeout_s": above(0),
    "judge.retries": at_least(0),
    "judge.concurrency": at_least(1),
    "judge.max_tokens": at_least(1),
    "rollout.prompts_per_step": at_least(1),
    "rollout.group_size": at_least(2),
    "rollout.max_new_tokens": at_least(1),
    "rollout.temperature": above(0),
    "rollout.top_k": at_least(0),
    "rollout.top_p": between(0, 1, low_open=True),
    "rollout.min_p": between(0, 1, high_open=True),
    "rollout.max_rows": at_least(1),
    "rollout.refill": between(0, 100),
    "rollout.rest": at_least(0),
    "engine.retries": at_least(0),
    "engine.timeout_s": above(0),
    "engine.start_timeout_s": above(0),
    "engine.gpu_memory_utilization": between(0, 1, low_open=True),
    "engine.max_mismatch": at_least(0),
    "memory.limit_gib": at_least(0),
    "advantage.std_floor": at_least(0),
    "loss.clip_low": between(0, 1),
    "loss.clip_high": at_least(0),
    "loss.ratio_cap": above(1),
    "loss.dual_clip": above(1),
    "loss.sapo_tau_pos": above(0),
    "loss.sapo_tau_neg": above(0),
    "loss.gamma_pos": pair(above(0)),
    "loss.gamma_neg": pair(above(0)),
    "loss.kl_coef": at_least(0),
    "loss.mismatch_low": at_least(0),
    "loss.mismatch_high": above(0),
    "loss.entropy_quantile": between(0, 1, low_open=True),
    "loss.off_policy_threshold": at_least(0),
    "loss.entropy_coef": at_least(0),
    "optim.lr": above(0),
    "optim.weight_decay": at_least(0),
    "optim.betas": pair(between(0, 1, high_open=True)),
    "optim.eps": above(0),
    "optim.warmup_steps": at_least(0),
    "optim.max_grad_norm": at_least(0),
    "optim.updates_per_rollout": at_least(1),
    "optim.minibatches": at_least(1),
    "optim.token_budget": at_least(16),
    "limits.kl": at_least(0),
    "limits.ratio": at_least(0),
    "limits.grad_norm": at_least(0),
    "limits.mismatch": at_least(0),
    "limits.patience": at_least(1),
    "limits.skipped": at_least(0),
    "run.max_dumps": at_least(0),
    "run.steps": at_least(1),
    "run.eval_every": at_least(0),
    "run.save_every": at_least(0),
    "run.keep_checkpoints": at_least(1),
    "run.samples": at_least(0),
    "miniature.hidden": at_least(8),
    "miniature.layers": at_least(1),
    "miniature.heads": at_least(1),
    "miniature.demonstrations": at_least(1),
    "miniature.warm_epochs": at_least(1),
    "miniature.warm_lr": above(0),
    "miniature.labelled": at_least(1),
    "miniature.reward_epochs": at_least(1),
    "miniature.reward_lr": above(0),
    "miniature.batch_size": at_least(1),
}


def check(config: TrainConfig) -> None:
    """Raises `FieldError` for the first setting that is out of range or contradicts another."""
    check_ranges(config, _RANGES)
    check_common(config)
    _check_names(config)
    _check_rewards(config)
    check_engine(config.engine)
    _check_together(config)


def _check_names(config: TrainConfig) -> None:
    if not config.data.prompt_column:
        raise FieldError("data.prompt_column", "must name a column, got an empty text")
    if not config.policy.lora_targets or not all(config.policy.lora_targets):
        raise FieldError("policy.lora_targets", "must name at least one layer, or be all-linear")
    if not all(config.rollout.stop_tokens):
        raise FieldError("rollout.stop_tokens", "must not hold an empty text")
    if not all(config.rollout.stop_strings):
        raise FieldError("rollout.stop_strings", "must not hold an empty text")


def _check_rewards(config: TrainConfig) -> None:
    reward = config.reward
    if reward.weights and not any(reward.weights.values()):
        raise FieldError("reward.weights", "must not all be 0: nothing would be trained")
    for index, function in enumerate(reward.functions):
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", function):
            raise FieldError("reward.functions", f"must be module:function, got {function!r}")
        if function in reward.functions[:index]:
            raise FieldError("reward.functions", f"names {function} twice")
    for index, model in enumerate(reward.model):
        if not model or model in reward.model[:index]:
            raise FieldError(
                "reward.model", f"names {model} twice" if model else "must not hold an empty text"
            )
    if reward.isolation == "thread":
        for name, given in (
            ("on_failure", reward.on_failure != "stop"),
            ("memory_limit_gib", reward.memory_limit_gib),
        ):
            if given:
                raise FieldError(
                    f"reward.{name}", "needs reward.isolation = process: a thread cannot be stopped"
                )
    for name, k in reward.lower_bounds.items():
        if k <= 0:
            raise FieldError(f"reward.lower_bounds.{name}", f"must be > 0, got {k}")
        if name in reward.thresholds:
            raise FieldError(
                f"reward.thresholds.{name}", "cannot be given with a lower bound of the same name"
            )
    if reward.floor_lr != 0.05 and not reward.floors:
        raise FieldError("reward.floor_lr", "needs reward.floors")
    judge = config.judge
    if judge.url:
        check_address("judge", judge.url)
    for name, value in (("model", judge.model), ("rubrics", judge.rubrics)):
        if judge.url and not value:
            raise FieldError(f"judge.{name}", f"must be given with judge.url = {judge.url}")
        if value and not judge.url:
            raise FieldError("judge.url", f"must be given with judge.{name}")
    if judge.scale[0] >= judge.scale[1]:
        raise FieldError("judge.scale", f"must rise, got {judge.scale[0]:g} {judge.scale[1]:g}")
    if config.policy.model and not (reward.model or reward.functions or judge.url):
        raise FieldError(
            "reward", "needs reward.model, reward.functions or judge.url when policy.model is given"
        )


def _check_together(config: TrainConfig) -> None:
    policy, data, rollout = config.policy, config.data, config.rollout
    loss, optim = config.loss, config.optim
    if policy.model and not data.prompts:
        raise FieldError("data.prompts", f"must be given with policy.model = {policy.model!r}")
    for name, value in (("prompts", data.prompts), ("eval_prompts", data.eval_prompts)):
        if value and not policy.model:
            raise FieldError(f"data.{name}", f"needs policy.model: the miniature cannot read {value!r}")
    if data.system_prompt and not policy.model:
        raise FieldError("data.system_prompt", "needs policy.model: the miniature has no system prompts")
    if policy.compile == "on" and policy.liger:
        raise FieldError(
            "policy.compile",
            "cannot be on with policy.liger: both replace the same parts of a layer; choose one",
        )
    truncated = {"top_k": rollout.top_k > 0, "top_p": rollout.top_p < 1, "min_p": rollout.min_p > 0}
    # No preset corrects the mismatch, so None (the preset's) is "none".
    if any(truncated.values()) and loss.mismatch in (None, "none"):
        name = next(name for name, used in truncated.items() if used)
        raise FieldError(
            f"rollout.{name}",
            "biases the probability ratio: leave it off, or set loss.mismatch to truncate, mask or "
            "sequence_mask",
        )
    if rollout.ahead and loss.mismatch in (None, "none"):
        raise FieldError(
            "rollout.ahead",
            "trains on older weights' completions: set loss.mismatch to truncate, mask or sequence_mask",
        )
    if config.reward.overlong_buffer > rollout.max_new_tokens:
        raise FieldError(
            "reward.overlong_buffer",
            f"must be <= rollout.max_new_tokens = {rollout.max_new_tokens}, got {config.reward.overlong_buffer}",
        )
    if config.engine.kv_dtype == "fp8" and loss.mismatch in (None, "none"):
        raise FieldError(
            "engine.kv_dtype",
            "fp8 samples from a slightly different distribution: use auto, or set loss.mismatch to truncate, mask or "
            "sequence_mask",
        )
    if config.engine.merge_lora and not policy.lora_rank:
        raise FieldError("engine.merge_lora", "needs policy.lora_rank: there is no adapter to merge")
    if policy.compile == "on" and config.memory.activations_on_host:
        raise FieldError(
            "policy.compile", "has not been tried with memory.activations_on_host; use one of them"
        )
    if policy.quantize != "none" and not policy.model:
        raise FieldError("policy.quantize", "needs policy.model: the miniature is too small for it")
    if policy.quantize != "none" and not policy.lora_rank:
        raise FieldError("policy.quantize", "needs policy.lora_rank: weights in 4 bits cannot be trained")
    if rollout.ahead:
        every = {"eval_every": config.run.eval_every, "save_every": config.run.save_every}
        for name, value in every.items():
            if value == 1:
                raise FieldError(
                    f"run.{name}", "= 1 leaves rollout.ahead nothing to do: each step waits for it"
                )
        if config.engine.sleep:
            raise FieldError("engine.sleep", "frees memory while training, when rollout.ahead generates")
    if config.engine.merge_copies != "device" and not config.engine.merge_lora:
        raise FieldError("engine.merge_copies", "needs engine.merge_lora")
    if config.engine.merge_lora and policy.quantize != "none":
        raise FieldError("engine.merge_lora", "cannot add adapters to weights in 4 bits; leave it off")
    if rollout.ahead and config.memory.optimizer == "while_training":
        raise FieldError(
            "memory.optimizer",
            "while_training makes room for generation, which rollout.ahead runs beside training",
        )
    if config.memory.optimizer == "host" and optim.optimizer == "adamw8bit":
        raise FieldError(
            "memory.optimizer", "host updates on the CPU in float32: take optim.optimizer = adamw with it"
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
