"""`--dry-run` of a reward model's training: what it would learn from, and on what."""

from rich.table import Table
from torch import nn
from transformers import PreTrainedConfig

from grpo_fast.config.resolve import device_named, resolve_dtype, run_folder
from grpo_fast.config.reward_settings import RewardConfig
from grpo_fast.miniature.setup import tiny_config
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.reward_backbone import empty_classifier, length_limit, linear_score, read_backbone
from grpo_fast.models.reward_fit import steps_of
from grpo_fast.models.reward_text import encode_examples
from grpo_fast.reward_task import Rated, counts
from grpo_fast.run.terminal import Terminal

GIB = 2**30


def print_reward_plan(config: RewardConfig, rated: Rated) -> None:
    """Print the plan; the backbone's configuration and tokenizer are read, its weights are not."""
    run_folder(config.output_dir, config.name, config.backbone.model or "miniature")
    if config.backbone.model:
        _, model, tokenizer = read_backbone(config.backbone.model)
    else:
        tokenizer = build_tokenizer()
        model = tiny_config(config.miniature, tokenizer)
    total, per_rank = _counted(model, len(rated.layout.names))
    examples = rated.training.examples
    limit = length_limit(model, config.data.max_tokens)
    encoded = encode_examples(tokenizer, examples, max_tokens=limit)
    encode_examples(tokenizer, rated.heldout.examples, max_tokens=limit)
    lengths = [
        len(ids) + len(encoded.prompt_ids[p])
        for ids, p in zip(encoded.completion_ids, encoded.prompt_of, strict=True)
    ]
    trained = config.backbone.lora_rank * per_rank or total
    device = device_named(config.device)
    item = resolve_dtype(config, device).itemsize
    state = 8 if config.optim.optimizer == "adamw" else 0
    held = total * item + trained * (4 + state + (0 if item == 4 else 4))
    steps = steps_of(len(examples), config.optim.batch_size, config.run.epochs)

    console = Terminal(soft_wrap=True)
    heads = Table(title="Heads", title_justify="left")
    for column in ("head", "kind", "scale", "training", "held out"):
        heads.add_column(column, justify="left" if column in ("head", "kind") else "right")
    known = counts(rated.heldout)["labels"]
    for head, (name, n) in zip(rated.layout.heads, counts(rated.training)["labels"].items(), strict=True):
        scale = "comparisons" if head.kind == "pairwise" else f"{head.low:g} to {head.high:g}"
        heads.add_row(name, head.kind, scale, f"{n:,}", f"{known.get(name, 0):,}")
    console.print(heads)
    table = Table(title="Plan", title_justify="left", show_header=False)
    table.add_row("backbone", config.backbone.model or "the miniature's, a new one")
    table.add_row("architecture", f"{model.model_type}, {total:,} parameters, {trained:,} trained")
    table.add_row("outputs", f"{len(rated.layout.names)} ({config.backbone.members} of each head)")
    table.add_row("replies", f"{len(lengths):,}, {sum(lengths):,} tokens, the longest {max(lengths):,}")
    table.add_row("prompts cut", f"{encoded.truncated:,} of replies longer than {limit:,} tokens")
    table.add_row("steps", f"{steps:,} of {config.optim.batch_size} prompts, {config.run.epochs:g} epochs")
    table.add_row("memory", f"{held / GIB:.2f} GiB on {device} for weights, gradients and optimizer")
    console.print(table)
    for warning in (*rated.training.warnings, *rated.heldout.warnings):
        console.print(f"warning: {warning}")
    console.print("Everything was checked; leave --dry-run out to start.")


def _counted(config: PreTrainedConfig, outputs: int) -> tuple[int, int]:
    """Parameters of the reward model, and those of an adapter of rank 1."""
    model = empty_classifier(config, outputs)
    score = linear_score(model)
    adapted = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not score]
    return sum(p.numel() for p in model.parameters()), sum(m.in_features + m.out_features for m in adapted)
