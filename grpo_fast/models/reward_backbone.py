"""What a reward model is put on: which models can carry heads, and what their configurations then say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_fast.attention.function import ATTENTION_NAME, config_obstacle
from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
from grpo_fast.models.reward_data import Layout


def read_backbone(path: str | Path) -> tuple[str, PreTrainedConfig, PreTrainedTokenizerBase]:
    """Source, configuration and tokenizer of a model that heads can be put on; UserError for any other."""
    source = pretrained.locate(path, "reward model backbone")
    config = pretrained.load_config(source, "reward model backbone")
    tokenizer = pretrained.load_tokenizer(source, "reward model backbone")
    check_fits(config, tokenizer, f"reward model backbone {path}")
    linear_score(empty_classifier(config, 1))
    return source, config, tokenizer


def empty_classifier(config: PreTrainedConfig, outputs: int) -> PreTrainedModel:
    """The architecture on the meta device, without weights."""
    config = copy.deepcopy(config)
    config.num_labels = outputs
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def fresh_classifier(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture with weights drawn in float32, for packed rows where it can have them."""
    model_class = cast(type, AutoModelForSequenceClassification._model_mapping[type(config)])
    attention = None if config_obstacle(model_class, config) else ATTENTION_NAME
    model = AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    return model.to(device, dtype)


def linear_score(model: PreTrainedModel) -> nn.Linear:
    """The layer that gives a classifier's outputs; UserError where there is none of the kind."""
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        name = type(model).__name__
        raise UserError(f"reward model: {name} has no linear `score` over its last token; use a decoder")
    return score


def length_limit(config: PreTrainedConfig, max_tokens: int | None) -> int | None:
    """The smaller of `max_tokens` and the positions a reply may have, None where neither is known."""
    positions, _ = pretrained.position_limit(config) or (None, "")
    return min(filter(None, (max_tokens, positions)), default=None)


def check_fits(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """UserError, before weights are read, where packed attention or `transformers` cannot classify with it."""
    try:
        model_class = AutoModelForSequenceClassification._model_mapping[type(config)]
    except KeyError as error:
        raise UserError(
            f"{what}: model type {config.model_type} has no sequence classification in transformers"
        ) from error
    pretrained.check_architecture(cast(type, model_class), config, what)
    pretrained.check_vocabulary(tokenizer, config.get_text_config().vocab_size, what)


def describe(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
    """Write the outputs, and the padding token where the model has none, into a configuration."""
    if not layout.heads:
        raise UserError("reward model: at least one head is needed")
    name_outputs(config, layout)
    config.problem_type = "regression"
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id


def name_outputs(config: PreTrainedConfig, layout: Layout) -> None:
    """Write the outputs' names into a configuration."""
    config.num_labels = len(layout.names)
    config.id2label = dict(enumerate(layout.names))
    config.label2id = {name: i for i, name in enumerate(layout.names)}
