"""The advantage kernels in Triton's interpreter: every mode and scale against the reference and PyTorch.

Programs of at most 8 sequences and blocks of 4 partial sums, so that several programs meet in each sum.
"""

from typing import Any

import pytest
import torch
from grpo_kernels import group_advantages, reference
from grpo_kernels.group_advantages import MODES
from test_kernels_advantages import COMBINATIONS
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from grpo_kernels import _advantage_kernels

EVERY_ADVANTAGE = pytest.mark.parametrize(("mode", "scale"), COMBINATIONS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(_advantage_kernels, "TILE", 8)
    monkeypatch.setattr(_advantage_kernels, "BLOCK", 4)
    torch.use_deterministic_algorithms(True)  # with this, uninitialised memory holds NaN
    yield
    torch.use_deterministic_algorithms(False)


def compare(rewards: Tensor, **options: Any) -> Tensor:
    found = group_advantages(rewards, backend="triton", **options)
    assert found.dtype == torch.float32 and found.shape == rewards.shape[:1] and found.isfinite().all()
    for true in (
        group_advantages(rewards, backend="torch", **options),
        reference.group_advantages(rewards, **options),
    ):
        torch.testing.assert_close(found, true, rtol=2e-6, atol=2e-7)
        assert torch.equal(found == 0, true == 0)
    return found


@pytest.mark.parametrize("sizes", [None, [3, 5, 8, 7, 1], [11, 13]], ids=["equal", "unequal", "long"])
@EVERY_ADVANTAGE
def test_matches_both_paths(mode, scale, sizes):
    rewards = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    options = {"mode": mode, "scale": scale, "group_sizes": sizes}
    compare(rewards, **options)
    rewards[3, 1] = rewards[12, 0] = torch.nan
    rewards[5] = torch.nan  # nothing known of this sequence
    rewards[8:16, 2] = 1.3  # a head without signal
    rewards[16:] = 0.7  # a group without signal
    compare(rewards, weights=[1.0, -0.5, 2.0], std_floor=0.1, eps=0.3, **options)


@EVERY_ADVANTAGE
def test_groups_of_six_and_two_heads(mode, scale):
    """Neither is a power of two of the block, and the last program has half a load."""
    rewards = torch.randn(18, 2, generator=torch.Generator().manual_seed(2))
    rewards[rewards > 1.2] = torch.nan
    compare(rewards, group_size=6, mode=mode, scale=scale, weights=torch.tensor([2, 1]))


@EVERY_ADVANTAGE
def test_large_rewards_of_tiny_spread(mode, scale):
    """1e4 with a spread of 0.05: more than float32 arithmetic could keep."""
    rewards = 1e4 + 0.05 * torch.randn(12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    compare(rewards, group_size=4, mode=mode, scale=scale)


def test_a_group_of_a_thousand(monkeypatch):
    monkeypatch.undo()
    rewards = torch.randn(1010, 2, generator=torch.Generator().manual_seed(4))
    compare(rewards, group_sizes=[1000, 10], mode="gdpo", scale="batch")


def test_check_vector():
    rewards = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    half = 0.5**0.5
    for mode, wanted in (
        ("scalarized", [-half, half, -half, half]),
        ("per_head", [-half, half, -2 * half, 2 * half]),
    ):
        found = compare(rewards, group_size=2, mode=mode)
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_without_signal_exactly_zero(mode):
    for value in (0.1, 100.0, -7.7):
        rewards = torch.cat([torch.full((8, 2), value), torch.randn(8, 2)])
        found = compare(rewards, mode=mode)
        assert (found[:8] == 0).all() and (found[8:] != 0).all()
    for rewards in (torch.full((8, 2), 0.3), torch.zeros(8), torch.full((8, 1), torch.nan)):
        assert (compare(rewards, group_size=4, mode=mode, eps=0.0) == 0).all()
    win = torch.rand(8)
    assert mode != "scalarized" or (compare(torch.stack([win, -win], 1), mode=mode) == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_floor_that_is_the_spread_itself(mode):
    """The floor is compared as the float64 that it is, not rounded to float32."""
    rewards = torch.tensor([0.0, 0.1, 0.2] * 2, dtype=torch.float64)
    spread = float(rewards[:3].std())
    options: dict[str, Any] = {"group_size": 3, "mode": mode}
    assert (compare(rewards, std_floor=spread * (1 + 1e-12), **options) == 0).all()
    assert (compare(rewards, std_floor=spread * (1 - 1e-12), **options) != 0).any()


@pytest.mark.parametrize("mode", MODES)
def test_types_and_small_cases(mode):
    for rewards in (
        torch.tensor([3, 7, 1, 5]),
        torch.tensor([True, False, False, True]),
        torch.tensor([0.5, 2.0, 1.5, 3.0]).half(),
        torch.arange(8.0)[::2],
    ):
        compare(rewards, group_sizes=torch.tensor([1, 2, 1]), mode=mode)
        compare(rewards, group_size=1, mode=mode)
        compare(rewards, group_size=4, mode=mode)
    assert group_advantages(torch.empty(0, 3), mode=mode, backend="triton").shape == (0,)


def test_what_it_does_not_take(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"):
        group_advantages(torch.ones(8), backend="cuda")
    with pytest.raises(ValueError, match=r"rewards must be finite or NaN"):
        group_advantages(torch.full((8,), torch.inf), backend="triton")
    from grpo_kernels import _loss_kernels

    monkeypatch.setattr(_loss_kernels, "token_losses", None)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got cpu.*TRITON_INTERPRET"):
        group_advantages(torch.ones(8), backend="triton")
