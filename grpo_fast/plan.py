"""`--dry-run`: what a run would do and what it would need, said before it starts."""

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from grpo_fast.config.resolve import advantage_choice, loss_config, resolve_device, resolve_dtype, run_path
from grpo_fast.config.settings import TrainConfig
from grpo_fast.miniature.setup import TRAINING_PROMPTS, tiny_config
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.miniature.world import OBJECTIVES
from grpo_fast.models.memory import MemoryEstimate, count_parameters, memory_estimate
from grpo_fast.models.policy import SavedPolicy
from grpo_fast.rewards.functions import objective_weights
from grpo_fast.task import Inputs, Task, load

GIB = 2**30


def print_plan(config: TrainConfig, inputs: Inputs) -> None:
    """Print the plan; the memory comes first, from the configurations alone, then everything is loaded and checked."""
    run_path(config)  # refuses an existing folder before anything is printed
    device = resolve_device(config)
    policy_config, reward_configs = _model_configs(config, inputs)
    console = Console(soft_wrap=True)
    estimate = _memory(config, policy_config, reward_configs)
    console.print(_memory_table(estimate, device))
    task = load(config, inputs) if config.policy.model else None
    console.print(_plan_table(config, policy_config, task))
    console.print("Everything was checked; leave --dry-run out to start.")


def _model_configs(config: TrainConfig, inputs: Inputs) -> tuple[PreTrainedConfig, list[PreTrainedConfig]]:
    rewards = [saved.config for saved in inputs.reward_models]
    if not config.policy.model:
        settings, tokenizer = config.miniature, build_tokenizer()
        small = tiny_config(settings, tokenizer)
        return small, rewards or [small]
    return SavedPolicy.read(config.policy.model).config, rewards


def _memory(config: TrainConfig, policy: PreTrainedConfig, rewards: list[PreTrainedConfig]) -> MemoryEstimate:
    dtype = resolve_dtype(config, resolve_device(config))
    rows = min(config.rollout.max_rows, config.rollout.prompts_per_step * config.rollout.group_size)
    return memory_estimate(
        policy,
        dtype=dtype,
        token_budget=config.optim.token_budget,
        lora_rank=config.policy.lora_rank or None,
        lora_all_linear=config.policy.lora_targets == ("all-linear",),
        gradient_checkpointing=config.policy.gradient_checkpointing,
        needs_reference=loss_config(config).kl_coef != 0,
        rollout_rows=rows,
        rollout_tokens=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        reward_models=rewards,
        reward_dtype=dtype,
        optimizer="adafactor" if config.optim.optimizer == "adafactor" else "adamw",
    )


def _memory_table(estimate: MemoryEstimate, device: torch.device) -> Table:
    table = Table(title=f"Estimated memory on {device}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, size in estimate.as_dict().items():
        if size:
            table.add_row(part.replace("_", " "), f"{size / GIB:.2f} GiB")
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
        fits = "fits" if estimate.total < 0.9 * available else "does not fit"
        table.add_row(f"{fits} in the device's", f"{available / GIB:.2f} GiB")
    return table


def _plan_table(config: TrainConfig, policy: PreTrainedConfig, task: Task | None) -> Table:
    rollout, loss = config.rollout, loss_config(config)
    counts = count_parameters(policy)
    names = task.scorer.names if task else list(OBJECTIVES)
    weights = (task.scorer.weights if task else objective_weights(names, config.reward)).tolist()
    trained = counts.total if config.policy.lora_rank == 0 else config.policy.lora_rank * counts.lora_per_rank
    mode, scale = advantage_choice(config)
    completions = rollout.prompts_per_step * rollout.group_size
    reference = (
        "none"
        if loss.kl_coef == 0
        else "the adapter switched off"
        if config.policy.lora_rank
        else "frozen copy"
    )
    longest = max(len(prompt.token_ids) for prompt in [*task.prompts, *task.heldout]) if task else None
    training, heldout = (
        (len(task.prompts), len(task.heldout)) if task else (TRAINING_PROMPTS, config.data.eval_size)
    )
    table = Table(title="Plan", title_justify="left", show_header=False)
    table.add_row("policy", f"{config.policy.model or 'the miniature, built and warm-started here'}")
    table.add_row("architecture", f"{policy.model_type}, {counts.total:,} parameters, {trained:,} trained")
    table.add_row(
        "objectives", ", ".join(f"{name} × {weight:g}" for name, weight in zip(names, weights, strict=True))
    )
    table.add_row("prompts", f"{training:,} for training, {heldout:,} held out")
    if longest is not None:
        table.add_row("longest prompt", f"{longest} tokens (limit {config.data.max_prompt_tokens})")
    table.add_row(
        "one step", f"{rollout.prompts_per_step} prompts × {rollout.group_size} completions = {completions}"
    )
    table.add_row("tokens a step", f"up to {completions * rollout.max_new_tokens:,} generated and trained on")
    table.add_row("loss", f"{config.loss.preset}, KL coefficient {loss.kl_coef:g}, reference: {reference}")
    table.add_row("advantages", f"{mode}, scaled by {scale}")
    reward = config.reward
    for title, given in (
        ("lower bounds", {name: f"score - {k:g} × spread" for name, k in reward.lower_bounds.items()}),
        ("thresholds", {name: f"1 from {number:g} on" for name, number in reward.thresholds.items()}),
        ("floors", {name: f"{number:g}, its weight a multiplier" for name, number in reward.floors.items()}),
    ):
        if given:
            table.add_row(title, "; ".join(f"{name}: {what}" for name, what in given.items()))
    for line in task.scorer.doubts() if task else ():
        table.add_row("reward model", line)
    table.add_row("steps", f"{config.run.steps}")
    table.add_row("folder", str(run_path(config)))
    return table
