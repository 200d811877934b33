"""`--dry-run`: what a run would do and what it would need, said before it starts."""

import torch
from rich.table import Table
from transformers import PreTrainedConfig

from grpo_fast.config.resolve import advantage_choice, loss_config, resolve_device, run_path
from grpo_fast.config.settings import TrainConfig
from grpo_fast.fit import models_of, work_of
from grpo_fast.memory.choose import GIB
from grpo_fast.memory.device import available_bytes
from grpo_fast.memory.estimate import MemoryEstimate, Planner
from grpo_fast.memory.passes import ParameterCounts
from grpo_fast.miniature.setup import TRAINING_PROMPTS
from grpo_fast.miniature.world import OBJECTIVES
from grpo_fast.rewards.functions import objective_weights
from grpo_fast.run.terminal import Terminal
from grpo_fast.task import Inputs, Task, load


def print_plan(config: TrainConfig, inputs: Inputs) -> None:
    """Print the plan; the memory comes first, from the configurations alone, then everything is loaded and checked."""
    run_path(config)  # refuses an existing folder before anything is printed
    device = resolve_device(config)
    work = work_of(config, models_of(config))
    counts, estimate = Planner(work).counts_and_estimate()
    console = Terminal(soft_wrap=True)
    console.print(_memory_table(estimate, device, config))
    task = load(config, inputs) if config.policy.model else None
    console.print(_plan_table(config, work.policy, counts, task))
    console.print("Everything was checked; leave --dry-run out to start.")


def _memory_table(estimate: MemoryEstimate, device: torch.device, config: TrainConfig) -> Table:
    table = Table(title=f"Estimated memory on {device}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, size in estimate.parts().items():
        if size >= GIB / 1000:
            table.add_row(part.replace("_", " "), f"{size / GIB:.3f} GiB")
    table.add_section()
    for phase, size in estimate.phases().items():
        table.add_row(f"peak, {phase}", f"{size / GIB:.3f} GiB")
    limit = config.memory.limit_gib
    table.add_row(
        "fits the limit of" if limit else "fits the device's",
        f"{limit or available_bytes(device) / GIB:.2f} GiB",
    )
    return table


def _plan_table(
    config: TrainConfig, policy: PreTrainedConfig, counts: ParameterCounts, task: Task | None
) -> Table:
    rollout, loss = config.rollout, loss_config(config)
    names = task.scorer.names if task else list(OBJECTIVES)
    weights = (task.scorer.weights if task else objective_weights(names, config.reward)).tolist()
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
    table.add_row(
        "architecture", f"{policy.model_type}, {counts.total:,} parameters, {counts.trained:,} trained"
    )
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
