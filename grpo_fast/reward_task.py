"""What a reward model's training works on: its ratings, checked and split, and the model with new heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fast.config.resolve import device_named, resolve_dtype
from grpo_fast.config.reward_settings import RewardConfig
from grpo_fast.data.ratings import Ratings, hold_out_ratings, read_ratings
from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.miniature import setup
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.reward_data import Layout, heads_of
from grpo_fast.models.reward_fit import TrainingSet
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.report.reward_page import write_reward_report
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import peak_memory_gib, write_atomically
from grpo_fast.summary import environment
from grpo_fast.trust.probes import ProbeTexts


@dataclass(frozen=True, kw_only=True)
class Rated:
    """Ratings to train on and ratings kept apart."""

    training: Ratings
    heldout: Ratings
    layout: Layout
    probe_texts: ProbeTexts
    """What the exploit probes say."""


def check_ratings(config: RewardConfig) -> Rated:
    """Read everything the run is trained and measured on; UserError names the first thing that is wrong."""
    data = config.data
    if data.ratings:
        options: dict[str, Any] = {"format": data.format, "kinds": data.kinds, "rename": data.rename}
        training = read_ratings(data.ratings, split=data.split, **options)
        if data.eval_ratings:
            heldout = read_ratings(data.eval_ratings, split=data.eval_split, **options)
            _check_heldout_heads(training, heldout)
        else:
            training, heldout = hold_out_ratings(training, data.eval_size)
        texts = ProbeTexts()
    else:
        training = setup.ratings("train", config.miniature.labelled, config.seed)
        heldout = setup.ratings("heldout", data.eval_size, config.seed)
        texts = setup.PROBE_TEXTS
    names = [head.name for head in training.heads]
    for name in config.loss.weights:
        if name not in names:
            raise UserError(
                f"loss.weights names {name!r}, but the heads are {', '.join(names)}{did_you_mean(name, names)}"
            )
    layout = Layout(
        heads=tuple(heads_of(training)),
        members=config.backbone.members,
        gaussian=config.loss.regression == "gaussian",
    )
    return Rated(training=training, heldout=heldout, layout=layout, probe_texts=texts)


def _check_heldout_heads(training: Ratings, heldout: Ratings) -> None:
    known = {head.name for head in training.heads}
    for head in heldout.heads:
        if head.name not in known:
            raise UserError(
                f"data.eval_ratings has a head {head.name}, which data.ratings has not ({', '.join(sorted(known))})"
                f"{did_you_mean(head.name, known)}"
            )


def build_model(config: RewardConfig, rated: Rated) -> RewardModel:
    """The backbone with new heads; without one, the miniature's small model with new weights."""
    device = device_named(config.device)
    dtype = resolve_dtype(config, device)
    backbone = config.backbone
    if not backbone.model:
        tokenizer = build_tokenizer()
        small = setup.tiny_config(config.miniature, tokenizer)
        return RewardModel.from_config(
            small, tokenizer, rated.layout, seed=config.seed, dtype=dtype, device=device
        )
    every = backbone.lora_targets == ("all-linear",)
    lora = LoraSettings(
        rank=backbone.lora_rank,
        alpha=backbone.lora_alpha,
        target_modules="all-linear" if every else backbone.lora_targets,
        seed=config.seed,
    )
    return RewardModel.from_backbone(
        backbone.model,
        rated.layout,
        seed=config.seed,
        dtype=dtype,
        device=device,
        lora=lora if backbone.lora_rank else None,
        gradient_checkpointing=backbone.gradient_checkpointing,
    )


def sample_rows(model: RewardModel, heldout: Ratings, step: int, n: int) -> list[dict[str, Any]]:
    """The first `n` held-out replies as rows of samples.jsonl, scores and labels in the labels' unit."""
    shown = [
        (example, reply, labels)
        for example in heldout.examples
        for reply, labels in zip(example.replies, example.labels, strict=True)
    ][:n]
    scores = model.scores([e.prompt for e, _, _ in shown], [reply for _, reply, _ in shown]).tolist()
    return [
        {
            "when": "after",
            "step": step,
            "prompt": e.prompt if isinstance(e.prompt, str) else e.prompt[-1]["content"],
            "completion": reply,
            "scores": dict(zip(model.head_names, row, strict=True)),
            "labels": labels,
        }
        for (e, reply, labels), row in zip(shown, scores, strict=True)
    ]


def findings(model: RewardModel, rated: Rated) -> list[str]:
    """What one should know at the end: the data's faults and each head's verdict."""
    warnings = [f"warning: {text}" for text in (*rated.training.warnings, *rated.heldout.warnings)]
    return [*warnings, *(f"{head.name}: {head.verdict}" for head in model.heads if head.verdict)]


def write_results(
    run: Run,
    config: RewardConfig,
    rated: Rated,
    model: RewardModel,
    data: TrainingSet,
    quality: dict[str, Any] | None,
    *,
    steps: int,
) -> None:
    """Write quality.json, summary.json and report.html; of an interrupted run, which has no `quality`, the summary."""
    rows = [row for row in run.rows() if row["phase"] == "reward_model"]
    seconds = sum(row["time/step_s"] for row in rows)
    counted: dict[str, int] = {}
    for part, ratings in (("training", rated.training), ("held-out", rated.heldout)):
        found = counts(ratings)
        counted |= {f"{part} prompts": found["prompts"], f"{part} replies": found["replies"]}
        counted |= {f"{part} labels of {name}": n for name, n in found["labels"].items()}
    counted["replies whose prompt lost its beginning"] = data.encoded.truncated
    described = {"warnings": [*rated.training.warnings, *rated.heldout.warnings], "counts": counted}
    if quality is not None:
        whole = {**quality, "data": described}
        write_atomically(run.path / "quality.json", json.dumps(whole, indent=2, allow_nan=False))
    run.logger.summary(
        {
            "name": run.path.name,
            "status": "interrupted" if quality is None else "finished",
            "steps": steps,
            "seed": config.seed,
            "tokens_per_s": sum(row.get("trained_tokens") or 0 for row in rows) / seconds
            if seconds
            else None,
            "peak_memory_gib": peak_memory_gib(),
            "heads": {
                head.name: {"kind": head.kind, **_headline((quality or {}).get("heads", {}).get(head.name))}
                for head in model.heads
            },
            "data": described,
            "environment": environment(model.device),
        }
    )
    if quality is not None:
        write_reward_report(run.path)


def _headline(measured: dict[str, Any] | None) -> dict[str, Any]:
    names = ("verdict", "n", "mae", "pearson", "spearman", "pairwise_accuracy")
    return {} if measured is None else {name: measured.get(name) for name in names}


def counts(ratings: Ratings) -> dict[str, Any]:
    """Examples, replies, and the labels or comparisons of each head."""
    by_head = {head.name: 0 for head in ratings.heads}
    for example in ratings.examples:
        names: Sequence[str] = [name for row in example.labels for name in row]
        for name in (*names, *(c.head for c in example.comparisons)):
            by_head[name] += 1
    return {
        "prompts": len(ratings.examples),
        "replies": sum(len(example.replies) for example in ratings.examples),
        "labels": by_head,
    }
