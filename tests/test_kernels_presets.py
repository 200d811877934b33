"""LossConfig and its presets against the published values, and group_advantages against plain arithmetic."""

import math
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from grpo_kernels import PRESETS, LossConfig, group_advantages, reference

BOTH = pytest.mark.parametrize(
    "function", [group_advantages, reference.group_advantages], ids=["kernel", "reference"]
)

GSPO = {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "grpo": {"kl": "k3", "kl_coef": 0.04, "aggregation": "sequence_mean"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean", "kl_coef": 0.0},
    "dr_grpo": {"aggregation": "constant", "kl_coef": 0.0},
    "gspo": GSPO | {"aggregation": "sequence_mean"},
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean", "kl_coef": 0.0},
    "sapo": {"surrogate": "sapo", "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05, "kl_coef": 0.0},
    "vespo": {"surrogate": "gamma", "gamma_pos": (2.0, 3.0), "gamma_neg": (3.0, 2.0), "kl_coef": 0.0},
    "luspo": GSPO | {"aggregation": "constant"},
    "rloo": {"surrogate": "reinforce", "kl_coef": 0.0},
    "reinforce_pp": {"surrogate": "clip", "aggregation": "token_mean"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_values(name: str):
    config = PRESETS[name]
    assert {field: getattr(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    plain = {"mismatch": "none", "entropy_coef": 0.0, "entropy_quantile": None, "off_policy_threshold": None}
    assert {field: getattr(config, field) for field in plain} == plain
    assert LossConfig.preset(name) == config
    assert LossConfig.preset(name, kl_coef=0.5).kl_coef == 0.5
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("surrogate", "ppo"),
        ("mismatch", "clip"),
        ("aggregation", "mean"),
        ("ratio_level", "word"),
        ("clip_high", -0.1),
        ("clip_low", 1.5),
        ("kl_coef", -1.0),
        ("entropy_coef", float("nan")),
        ("clip_high", float("nan")),
        ("mismatch_low", -0.5),
        ("sapo_tau_neg", 0.0),
        ("ratio_cap", 0.9),
        ("dual_clip", 1.0),
        ("entropy_quantile", 1.1),
    ],
)
def test_values_out_of_range_are_named(field: str, value: Any):
    with pytest.raises(ValueError) as caught:
        LossConfig.preset("grpo", **{field: value})
    assert field in str(caught.value) and repr(value) in str(caught.value)


def by_hand(
    rewards: list[list[float]], groups: list[int], w: list[float], mode: str, scale: str | None, eps: float
) -> list[float]:
    """Group-relative advantages of complete rewards, by lists and ``statistics``."""
    scale = scale or ("none" if mode == "leave_one_out" else "group")
    rows = rewards
    if mode in ("scalarized", "leave_one_out"):
        rows, w = [[sum(a * b for a, b in zip(w, row, strict=True))] for row in rewards], [1.0]
    everything = [stdev(row[k] for row in rows) for k in range(len(w))]
    result: list[float] = []
    start = 0
    for size in groups:
        here = rows[start : start + size]
        means = [fmean(row[k] for row in here) for k in range(len(w))]
        sigmas = [stdev(row[k] for row in here) for k in range(len(w))] if scale == "group" else everything
        for row in here:
            off = [value - mean for value, mean in zip(row, means, strict=True)]
            if mode == "leave_one_out":
                off = [row[0] - (sum(other[0] for other in here) - row[0]) / (size - 1)]
            if mode == "dvao":
                divisors = [sum(abs(a) * s for a, s in zip(w, sigmas, strict=True)) + eps] * len(w)
            else:
                divisors = [1.0 if scale == "none" else s + eps for s in sigmas]
            result.append(sum(a * b / c for a, b, c in zip(w, off, divisors, strict=True)))
        start += size
    if mode == "gdpo":
        spread = stdev(result) + eps
        result = [value / spread for value in result]
    return result


@pytest.mark.parametrize("groups", [[4, 4, 4], [2, 7, 3]], ids=["equal", "unequal"])
@pytest.mark.parametrize("scale", [None, "group", "batch", "none"])
@pytest.mark.parametrize("mode", ["scalarized", "per_head", "gdpo", "dvao", "leave_one_out"])
@BOTH
def test_advantages_by_hand(function, mode: str, scale: str | None, groups: list[int]):
    if mode == "dvao" and scale == "none":
        return
    rewards = torch.randn(12, 3, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 10.0, 0.1])
    weights = [1.0, 0.2, -3.0]
    for eps in (1e-6, 0.1):
        found = function(rewards, group_sizes=groups, weights=weights, mode=mode, scale=scale, eps=eps)
        wanted = torch.tensor(by_hand(rewards.double().tolist(), groups, weights, mode, scale, eps))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@BOTH
def test_missing_rewards_by_hand(function):
    """The mean and spread are of what was observed; what was not adds nothing."""
    nan = math.nan
    rewards = torch.tensor([[1.0, nan], [3.0, 2.0], [nan, 4.0], [8.0, nan]])
    found = function(rewards, group_size=4, mode="per_head", eps=0.0)
    first, second = stdev([1.0, 3.0, 8.0]), math.sqrt(2.0)
    wanted = torch.tensor([-3 / first, -1 / first - 1 / second, 1 / second, 4 / first])
    torch.testing.assert_close(found, wanted)
    nobody = function(torch.full((4, 2), nan), group_size=4, mode="per_head")
    assert torch.equal(nobody, torch.zeros(4))


@pytest.mark.parametrize("mode", ["scalarized", "per_head", "gdpo", "dvao", "leave_one_out"])
@BOTH
def test_nothing_but_flat_groups_without_eps(function, mode: str):
    """eps = 0 is allowed, and then a batch of flat groups must not turn into 0/0."""
    for rewards in (torch.full((8, 2), 0.3), torch.zeros(8), torch.full((8, 1), math.nan)):
        assert torch.equal(function(rewards, group_size=4, mode=mode, eps=0.0), torch.zeros(8))


@pytest.mark.parametrize("mode", ["scalarized", "per_head", "gdpo", "dvao", "leave_one_out"])
def test_groups_of_one_and_integer_rewards(mode: Any):
    found = group_advantages(torch.tensor([3, 7, 1, 5]), group_sizes=[1, 2, 1], mode=mode)
    assert found.dtype == torch.float32
    assert found[0] == found[3] == 0.0 and found[1] == -found[2] and found[1] > 0
