"""What is compared: every algorithm with its settings, and the four that its search may choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.baselines import dpo, policy_gradient, ppo
from benchmarks.baselines.dpo import DPO
from benchmarks.baselines.policy_gradient import PolicyGradient
from benchmarks.baselines.ppo import PPO
from benchmarks.cost.lab import Lab

Settings = PolicyGradient | PPO | DPO
Choice = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A row of the comparison."""

    title: str
    family: str
    train: Callable[[Lab, Any], None]
    settings: Settings
    grid: tuple[Choice, ...]
    """Fields of `settings` with other values; as many for every algorithm"""

    def chosen(self, choice: Choice) -> Settings:
        """The settings with a choice of the grid put in."""
        return replace(self.settings, **choice)


_GROUPS: tuple[Choice, ...] = (
    {"lr_scale": 1.0},
    {"lr_scale": 2.0},
    {"lr_scale": 1.0, "minibatches": 2},
    {"lr_scale": 2.0, "minibatches": 2},
)
_PPO: tuple[Choice, ...] = (
    {"lr_scale": 1.0},
    {"lr_scale": 2.0},
    {"lr_scale": 1.0, "value_from": "reward_model"},
    {"lr_scale": 2.0, "value_from": "reward_model"},
)
_PPO_SHARED: tuple[Choice, ...] = (
    {"lr_scale": 0.5},
    {"lr_scale": 1.0},
    {"lr_scale": 0.5, "kl_coef": 0.1},
    {"lr_scale": 1.0, "epochs": 1},
)
_DPO: tuple[Choice, ...] = (
    {"lr_scale": 0.25},
    {"lr_scale": 1.0},
    {"lr_scale": 0.25, "beta": 0.3},
    {"lr_scale": 1.0, "beta": 0.3},
)
_DPO_ONLINE: tuple[Choice, ...] = (
    {"lr_scale": 1.0},
    {"lr_scale": 2.0},
    {"lr_scale": 4.0},
    {"lr_scale": 2.0, "beta": 0.3},
)

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        title="GRPO, objectives normalised one by one",
        family="grpo",
        train=policy_gradient.train,
        settings=PolicyGradient(mode="gdpo"),
        grid=_GROUPS,
    ),
    "grpo_scalarized": Algorithm(
        title="GRPO as in the paper, rewards added up",
        family="grpo",
        train=policy_gradient.train,
        settings=PolicyGradient(mode="scalarized"),
        grid=_GROUPS,
    ),
    "grpo_no_kl": Algorithm(
        title="GRPO without a reference",
        family="grpo",
        train=policy_gradient.train,
        settings=PolicyGradient(mode="gdpo", kl_coef=0.0),
        grid=_GROUPS,
    ),
    "rloo": Algorithm(
        title="RLOO",
        family="reinforce",
        train=policy_gradient.train,
        settings=PolicyGradient(preset="rloo"),
        grid=_GROUPS,
    ),
    "reinforce_pp": Algorithm(
        title="REINFORCE++",
        family="reinforce",
        train=policy_gradient.train,
        settings=PolicyGradient(preset="reinforce_pp"),
        grid=_GROUPS,
    ),
    "ppo": Algorithm(
        title="PPO, a value network of its own",
        family="ppo",
        train=ppo.train,
        settings=PPO(),
        grid=_PPO,
    ),
    "ppo_shared": Algorithm(
        title="PPO, a value head on the policy",
        family="ppo",
        train=ppo.train,
        settings=PPO(shared=True),
        grid=_PPO_SHARED,
    ),
    "dpo": Algorithm(
        title="DPO, pairs of the start policy",
        family="dpo",
        train=dpo.train,
        settings=DPO(),
        grid=_DPO,
    ),
    "dpo_online": Algorithm(
        title="DPO, new pairs every round",
        family="dpo",
        train=dpo.train,
        settings=DPO(online=True, batches=2),
        grid=_DPO_ONLINE,
    ),
}
