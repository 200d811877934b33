"""Every setting of a reward model's training: frozen dataclasses, in the style of `settings.py`.

The defaults are those of the miniature's reward model, which needs no download.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from grpo_fast.config.check_reward import check_reward
from grpo_fast.config.settings import AdapterSettings, CommonConfig, MiniatureWorld

ColumnKind = Literal["regression", "binary", "ordinal"]


@dataclass(frozen=True, kw_only=True)
class BackboneSettings(AdapterSettings):
    """The model that the heads are put on."""

    model: str = ""
    """Folder or hub id of a decoder language model, or of a reward model to go on from; empty: the miniature's."""
    members: int = 1
    """Outputs of each head, each trained on its own sample of the labels; their spread tells how sure it is."""


@dataclass(frozen=True, kw_only=True)
class RatingSettings:
    """The rated replies and the preferences."""

    ratings: tuple[str, ...] = ()
    """Files (.jsonl, .json, .csv, .parquet), hub ids[:subset] or saved data sets, mixed; empty: the miniature's."""
    eval_ratings: tuple[str, ...] = ()
    """Held-out ratings, the same forms; empty: evenly spaced prompts leave the training ratings."""
    format: Literal[
        "auto", "columns", "helpsteer2", "ultrafeedback", "beavertails", "pku-saferlhf", "preference"
    ] = "auto"
    """Schema of every source; auto tells it by the columns."""
    kinds: dict[str, ColumnKind] = field(default_factory=dict[str, ColumnKind])
    """Kind of a column's head, name=kind ...; unnamed ones: binary where only 0 and 1 occur, else regression."""
    rename: dict[str, str] = field(default_factory=dict[str, str])
    """Heads under another name, old=new ...; file.jsonl:old=new for one source alone."""
    split: str = "train"
    """Hub data sets: the split the ratings come from."""
    eval_split: str = "validation"
    """Hub data sets: the split the held-out ratings come from."""
    eval_size: int = 600
    """Held-out prompts, kept out of training, on which the model is measured (the miniature's replies too)."""
    max_tokens: int = 2048
    """Longest prompt with its reply; of a longer one the prompt loses its beginning, the reply never a token."""


@dataclass(frozen=True, kw_only=True)
class RewardLossSettings:
    """The losses of the heads, each on the labels that are there."""

    regression: Literal["mse", "huber", "gaussian"] = "mse"
    """Regression heads; gaussian: each reply's variance is predicted too (its negative log-likelihood)."""
    huber_delta: float = 1.0
    """huber: errors above this many standard deviations of the label count linearly."""
    weights: dict[str, float] = field(default_factory=dict[str, float])
    """Weight of each head's loss, name=number ...; unnamed ones 1."""
    uncertainty_weighting: bool = False
    """Learn the weights: each head's loss over its learned noise (Kendall et al., arXiv 1705.07115)."""
    center_coef: float = 0.01
    """Pairwise heads: weight of the squared sum of a pair's two scores, which holds them around zero."""


@dataclass(frozen=True, kw_only=True)
class RewardOptimSettings:
    """The optimizer."""

    lr: float = 2e-3
    """Peak learning rate, then cosine to zero (when backbone.model is given and this is not: 1e-5, with LoRA 1e-4)."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw keeps 8 bytes of state a parameter, adafactor next to none."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to this; 0: never."""
    batch_size: int = 32
    """Prompts of one optimizer step, each with all of its replies."""
    token_budget: int = 8192
    """Tokens of one packed forward pass; changes memory and speed, never the gradient."""


@dataclass(frozen=True, kw_only=True)
class RewardRunSettings:
    """Length of the run and what it leaves behind."""

    epochs: float = 2.0
    """Passes over the ratings."""
    save_every: int = 200
    """Save a checkpoint every so many steps; 0: at the end and on interruption only."""
    keep_checkpoints: int = 1
    """Newest checkpoints kept."""
    save_async: bool = True
    """Write checkpoints while training goes on; a step waits for a copy in the host's memory, which must hold it."""
    probes: int = 200
    """Held-out replies that are turned into known exploits to see whether the scores rise; 0: none."""
    samples: int = 8
    """Held-out replies written to samples.jsonl and shown in the report."""
    wandb: bool = False
    """Log to Weights & Biases too (TensorBoard always)."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(CommonConfig):
    """Train a reward model that rates a reply on every objective at once, and measure how far it can be trusted."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    """The model that the heads are put on."""
    data: RatingSettings = field(default_factory=RatingSettings)
    """The rated replies and the preferences."""
    loss: RewardLossSettings = field(default_factory=RewardLossSettings)
    """The losses of the heads, each on the labels that are there."""
    optim: RewardOptimSettings = field(default_factory=RewardOptimSettings)
    """The optimizer."""
    run: RewardRunSettings = field(default_factory=RewardRunSettings)
    """Length of the run and what it leaves behind."""
    miniature: MiniatureWorld = field(default_factory=MiniatureWorld)
    """The embedded world: used when backbone.model is empty."""

    def __post_init__(self) -> None:
        check_reward(self)
