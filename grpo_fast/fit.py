"""Settings that fit the device, before anything is loaded: chosen where `memory.limit_gib` asks, else checked."""

from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftConfig
from transformers import PreTrainedConfig

from grpo_fast.config.resolve import (
    check_paths,
    loss_config,
    overlaps,
    resolve_device,
    resolve_dtype,
    split_name,
)
from grpo_fast.config.settings import TrainConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.choose import GIB, NF4_BYTES, Choice, as_asked, choose, gib, refusal
from grpo_fast.memory.device import available_bytes
from grpo_fast.memory.estimate import Planner, Work, rough_bytes
from grpo_fast.miniature.setup import tiny_config
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models import pretrained
from grpo_fast.models.lora import LoraSettings
from grpo_fast.parallel.world import world_size
from grpo_fast.task import lora_settings

MINIATURE_PROMPT_TOKENS = 48
"""More than the longest prompt of the embedded world has"""
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "adafactor": 0.0}
"""A trained parameter's; in 8 bits a block of 256 has a float32 scale."""


def fitted(config: TrainConfig) -> TrainConfig:
    """The configuration with token budget, checkpointing and rows that fit; a line is printed where they change.

    The limit is `memory.limit_gib`, or the device's memory where that is less. Without `limit_gib` the settings stay as
    they are: UserError where they need more than the device has, with the nearest that fits.
    """
    device = resolve_device(config)
    planner = Planner(work_of(config, models_of(config)))
    given, available = round(config.memory.limit_gib * GIB), available_bytes(device)
    available -= round(planner.work.server_share * available)
    limit = min(given or available, available)
    if rough_bytes(planner.work) <= limit:
        return config
    asked = as_asked(planner)
    if asked.estimate.peak <= limit:
        return config
    where = "memory.limit_gib" if given == limit else f"{device} on this machine"
    found = choose(planner, limit) if given else None
    if found is None:
        raise UserError(refusal(planner, limit, where))
    print(
        f"memory: as asked {gib(asked.estimate.peak)}, the limit is {gib(limit)}; chosen: "
        f"{found.flags(planner)} ({gib(found.estimate.peak)})"
    )
    return with_choice(config, found)


def with_choice(config: TrainConfig, choice: Choice) -> TrainConfig:
    """The configuration with what was chosen."""
    return replace(
        config,
        optim=replace(config.optim, token_budget=choice.token_budget),
        policy=replace(config.policy, gradient_checkpointing=choice.gradient_checkpointing),
        rollout=replace(config.rollout, max_rows=choice.max_rows),
    )


@dataclass(frozen=True, kw_only=True)
class Models:
    """What is known of a run's models before one is loaded."""

    policy: PreTrainedConfig
    rewards: tuple[PreTrainedConfig, ...]
    lora: LoraSettings | None
    """The adapter that is trained, new or saved"""


def models_of(config: TrainConfig) -> Models:
    """Configurations of the policy and of the reward models; UserError where one cannot be read."""
    check_paths(config)
    lora = lora_settings(config)
    rewards = tuple(
        pretrained.load_config(split_name(spec)[1], "reward model") for spec in config.reward.model
    )
    if not config.policy.model:
        small = tiny_config(config.miniature, build_tokenizer())
        return Models(policy=small, rewards=rewards or (small,), lora=lora)
    source = pretrained.locate(config.policy.model, "model", needs=("config.json", "adapter_config.json"))
    if (Path(source) / "adapter_config.json").is_file():
        saved = PeftConfig.from_pretrained(source)
        source = str(saved.base_model_name_or_path)
        targets = getattr(saved, "target_modules", None) or "all-linear"
        lora = LoraSettings(
            rank=getattr(saved, "r", 0) or 8,
            target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        )
    return Models(policy=pretrained.load_config(source, "model"), rewards=rewards, lora=lora)


def work_of(config: TrainConfig, models: Models) -> Work:
    """What the planner has to know of a run."""
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    rollout, loss = config.rollout, loss_config(config)
    return Work(
        policy=models.policy,
        device=device.type,
        dtype=dtype,
        lora=models.lora,
        reference=loss.kl_coef != 0,
        entropy=loss.entropy_coef != 0,
        token_budget=config.optim.token_budget,
        gradient_checkpointing=config.policy.gradient_checkpointing,
        prompts=rollout.prompts_per_step,
        minibatches=config.optim.minibatches,
        group_size=rollout.group_size,
        prompt_tokens=config.data.max_prompt_tokens if config.policy.model else MINIATURE_PROMPT_TOKENS,
        new_tokens=rollout.max_new_tokens,
        max_rows=rollout.max_rows,
        eval_prompts=config.data.eval_size,
        truncates=rollout.truncates,
        reward_models=models.rewards,
        reward_dtype=dtype,
        overlap=overlaps(config, device),
        state_bytes=STATE_BYTES[config.optim.optimizer],
        factored=config.optim.optimizer == "adafactor",
        frozen_bytes=NF4_BYTES if config.policy.quantize == "nf4" else None,
        optimizer_on_host=config.memory.optimizer == "host",
        optimizer_parked=config.memory.optimizer == "while_training",
        activations_on_host=config.memory.activations_on_host,
        ahead=config.rollout.ahead,
        engine=config.engine.kind == "local",
        engine_sleeps=config.engine.sleep,
        server_share=config.engine.gpu_memory_utilization
        if config.engine.executable and not config.engine.devices and not config.engine.sleep
        else 0.0,
        merged_copies=config.engine.merge_lora and config.engine.merge_copies == "device",
        fp8_cache=config.engine.kv_dtype == "fp8",
        ranks=world_size(),
        reduced_each=config.parallel.reduce == "micro_batch",
    )
