"""Made-up records of `benchmarks.cost`, for tests of what is made from them. Nothing here was measured."""

from __future__ import annotations

import math
import random
from typing import Any

OBJECTIVES = ("safety", "politeness", "meaningfulness", "actionability")
# name: title, family, speed of learning, most of the gain, seconds a step, memory, tokens a step, nets scored
ALGORITHMS = {
    "grpo": ("GRPO", "grpo", 1.0, 1.0, 1.0, 1.0, 2000, 3),
    "grpo_scalarized": ("GRPO, scalarised", "grpo", 0.95, 0.93, 1.0, 1.0, 2000, 3),
    "grpo_no_kl": ("GRPO without KL", "grpo", 1.1, 0.97, 0.8, 0.8, 2000, 3),
    "rloo": ("RLOO", "reinforce", 0.9, 0.95, 1.0, 1.0, 2000, 3),
    "reinforce_pp": ("REINFORCE++", "reinforce", 0.8, 0.9, 1.0, 1.0, 2000, 3),
    "ppo": ("PPO", "ppo", 0.6, 0.9, 2.1, 2.0, 2000, 6),
    "ppo_shared": ("PPO, shared trunk", "ppo", 0.55, 0.85, 1.3, 1.1, 2000, 4),
    "dpo": ("DPO, offline", "dpo", 1.2, 0.5, 0.8, 1.0, 1500, 3),
    "dpo_online": ("DPO, online", "dpo", 0.8, 0.8, 1.0, 1.0, 2000, 3),
}


def point(step: int, cost: float, quality: float, **others: Any) -> dict[str, Any]:
    """An evaluation in which every currency stands at `cost` and every objective at `quality`."""
    currencies = (
        "wall_s",
        "cpu_s",
        "generated_tokens",
        "trained_tokens",
        "flops",
        "training_flops",
        "reward_calls",
    )
    found = dict.fromkeys(currencies, cost) | {"judge": dict.fromkeys(OBJECTIVES, quality)}
    found |= {"reward": dict.fromkeys(OBJECTIVES, quality), "mean": quality, "worst": quality}
    return found | {"step": step, "over_refusal": 0.2, "distinct": 0.5, "kl": 0.0, "length": 20.0} | others


def cell(algorithm: str, seed: int, curve: list[tuple[float, float]], **others: Any) -> dict[str, Any]:
    """A finished cell with (cost, quality) at its evaluations."""
    return {
        "algorithm": algorithm,
        "seed": seed,
        "settings": {"lr": 0.001},
        "status": "finished",
        "why": None,
        "device": "AMD EPYC",
        "commit": "a" * 40,
        "fingerprint": {part: f"{part}-{seed}" for part in ("start", "reward_model", "prompts", "heldout")},
        "memory": {"parts": {"policy": 7.0e6}, "peak": 3.0e7},
        "phase_s": {"generate": 1.0, "reward": 0.5, "reference": 0.5, "values": 0.0, "update": 2.0},
        "flops": {"generate": 10, "reward": 5, "reference": 5, "values": 0, "update": 20},
        "curve": [point(step, cost, quality) for step, (cost, quality) in enumerate(curve)],
    } | others


def record_of(cells: list[dict[str, Any]], budget: float = 100.0) -> dict[str, Any]:
    """A record that holds these cells."""
    names = list(dict.fromkeys(found["algorithm"] for found in cells))
    about = {
        name: {"title": ALGORITHMS[name][0], "family": ALGORITHMS[name][1], "settings": {"lr": 0.001}}
        for name in names
    }
    return {
        "benchmark": "cost",
        "device": "AMD EPYC",
        "threads": 1,
        "jobs": 1,
        "versions": {"torch": "2.13.0"},
        "commit": "a" * 40,
        "quick": False,
        "wall_s": 1000.0,
        "budget": dict.fromkeys(("wall_s", "generated_tokens", "training_flops"), budget),
        "work": {"prompts": 256, "batch": 64, "hidden": 128, "parameters": 1_800_000},
        "algorithms": about,
        "search": [
            {
                "algorithm": name,
                "settings": {"lr": lr, "epochs": 1},
                "seed": 7,
                "status": status,
                "quality": quality,
            }
            for name in names
            for lr, status, quality in ((0.001, "finished", 0.6), (0.1, "diverged", None))
        ],
        "cells": cells,
    }


def lively_record(seeds: int = 5) -> dict[str, Any]:
    """Nine algorithms whose curves look like real ones, a PPO seed that diverges, and a DPO that stays behind."""
    random.seed(3)
    cells = [_lively(name, seed) for seed in range(seeds) for name in ALGORITHMS]
    record = record_of(cells)
    return record | {"budget": {"wall_s": 90.0, "generated_tokens": 160_000, "training_flops": 4 * 10**12}}


def _lively(name: str, seed: int) -> dict[str, Any]:
    _, family, speed, most, pace, memory, tokens, nets = ALGORITHMS[name]
    start = 0.46 + 0.01 * (seed % 3)
    luck = 1 + 0.12 * random.uniform(-1, 1)
    step_flops = {"generate": 1.2e10, "reward": 1.0e10, "reference": 1.0e10, "update": 3.0e10 * nets / 3}
    step_flops["values"] = 2.0e10 if family == "ppo" else 0.0
    step_s = {key: pace * value / 6.2e10 for key, value in step_flops.items()}
    curve, steps = [], 150
    for step in range(0, steps + 1, 10):
        gain = most * (1 - math.exp(-speed * luck * step / 30)) + 0.02 * random.uniform(-1, 1) * (step > 0)
        scores = {key: start + x * gain for key, x in zip(OBJECTIVES, (0.44, 0.48, 0.38, 0.50), strict=True)}
        if name == "dpo" and step > 60:
            scores["actionability"] -= 0.001 * (step - 60)
        curve.append(
            {
                "step": step,
                "wall_s": sum(step_s.values()) * step * luck,
                "cpu_s": sum(step_s.values()) * step,
                "generated_tokens": tokens * (step if name != "dpo" else min(step, 60)),
                "trained_tokens": tokens * step,
                "flops": int(sum(step_flops.values()) * step),
                "training_flops": int(step_flops["update"] * step),
                "reward_calls": 64 * (step if name != "dpo" else min(step, 60)),
                "judge": scores,
                "reward": {key: value + 0.03 for key, value in scores.items()},
                "mean": sum(scores.values()) / 4,
                "worst": min(scores.values()),
                "over_refusal": 0.24 - 0.18 * gain,
                "distinct": 0.6 - 0.2 * gain,
                "kl": 30 * gain**2 * (2 if name == "grpo_no_kl" else 1) + 0.1 * step,
                "length": 30 + 4 * gain,
            }
        )
    base = {
        "policy": 7.2e6,
        "reference": 7.2e6,
        "reward_model": 7.3e6,
        "gradients": 7.2e6,
        "optimizer": 1.44e7,
    }
    if name == "grpo_no_kl":
        base["reference"] = 0
    if name == "ppo":
        base |= {"value_model": 7.2e6, "gradients": 1.44e7, "optimizer": 2.88e7}
    base["working"] = 2.0e7 * memory
    found = cell(name, seed, [])
    found |= {
        "curve": curve,
        "memory": {"parts": base, "peak": sum(base.values())},
        "phase_s": {key: value * steps for key, value in step_s.items()},
        "flops": {key: int(value * steps) for key, value in step_flops.items()},
    }
    if (name, seed) == ("ppo_shared", 1):
        found |= {"status": "diverged", "why": "loss is not finite at step 42", "curve": curve[:5]}
    return found
