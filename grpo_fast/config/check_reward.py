"""The checks of a `RewardConfig` that need no file and no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fast.config.rules import FieldError, Rule, above, at_least, between, check_common, check_ranges

if TYPE_CHECKING:
    from grpo_fast.config.reward_settings import RewardConfig

_RANGES: dict[str, Rule] = {
    "seed": between(0, 2**32, high_open=True),
    "threads": at_least(0),
    "backbone.members": at_least(1),
    "backbone.lora_rank": at_least(0),
    "backbone.lora_alpha": above(0),
    "data.eval_size": at_least(1),
    "data.max_tokens": at_least(2),
    "loss.huber_delta": above(0),
    "loss.center_coef": at_least(0),
    "optim.lr": above(0),
    "optim.weight_decay": at_least(0),
    "optim.warmup": between(0, 1),
    "optim.max_grad_norm": at_least(0),
    "optim.batch_size": at_least(1),
    "optim.token_budget": at_least(16),
    "run.epochs": above(0),
    "run.save_every": at_least(0),
    "run.keep_checkpoints": at_least(1),
    "run.probes": at_least(0),
    "run.samples": at_least(0),
    "miniature.hidden": at_least(8),
    "miniature.layers": at_least(1),
    "miniature.heads": at_least(1),
    "miniature.labelled": at_least(1),
}


def check_reward(config: RewardConfig) -> None:
    """Raises `FieldError` for the first setting that is out of range or contradicts another."""
    check_ranges(config, _RANGES)
    check_common(config)
    backbone, data, loss = config.backbone, config.data, config.loss
    for name, weight in loss.weights.items():
        if weight < 0:
            raise FieldError(f"loss.weights.{name}", f"must be >= 0, got {weight}")
    if not backbone.lora_targets or not all(backbone.lora_targets):
        raise FieldError("backbone.lora_targets", "must name at least one layer, or be all-linear")
    if not all((*data.ratings, *data.eval_ratings)):
        raise FieldError("data.ratings", "must not hold an empty text")
    for name in ("lora_rank", "gradient_checkpointing"):
        if getattr(backbone, name) and not backbone.model:
            raise FieldError(f"backbone.{name}", "needs backbone.model: the miniature's is small and new")
    if backbone.model and not data.ratings:
        raise FieldError("data.ratings", f"must be given with backbone.model = {backbone.model!r}")
    if data.eval_ratings and not data.ratings:
        raise FieldError("data.eval_ratings", "needs data.ratings")
    if data.ratings and not backbone.model:
        raise FieldError("backbone.model", "must be given with data.ratings: the miniature has its own")
    if not data.ratings and (data.kinds or data.rename):
        raise FieldError(f"data.{'kinds' if data.kinds else 'rename'}", "needs data.ratings")
    if loss.weights and not any(loss.weights.values()):
        raise FieldError("loss.weights", "must not all be 0: nothing would be trained")
    if backbone.lora_targets != ("all-linear",) and not backbone.lora_rank:
        raise FieldError("backbone.lora_targets", "needs backbone.lora_rank")
    if loss.huber_delta != 1.0 and loss.regression != "huber":
        raise FieldError("loss.huber_delta", f"needs loss.regression = huber, it is {loss.regression}")
    if loss.uncertainty_weighting and loss.weights:
        raise FieldError("loss.weights", "cannot be given with loss.uncertainty_weighting, which learns them")
    small = config.miniature
    if small.hidden % (2 * small.heads):
        raise FieldError(
            "miniature.hidden",
            f"must be a multiple of 2 * miniature.heads = {2 * small.heads}, got {small.hidden}",
        )
