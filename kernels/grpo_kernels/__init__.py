"""Fused operations of Group Relative Policy Optimization. ``reference`` holds their plain PyTorch twins."""

from .group_advantages import group_advantages
from .grpo_loss import grpo_loss
from .linear_grpo_loss import linear_grpo_loss
from .linear_logprob import linear_logprob
from .loss_config import PRESETS, LossConfig

__all__ = ["PRESETS", "LossConfig", "group_advantages", "grpo_loss", "linear_grpo_loss", "linear_logprob"]
