"""group_advantages: check vector, every mode and scale against the reference, missing and flat rewards."""

import pytest
import torch
from grpo_kernels import group_advantages, reference
from grpo_kernels.group_advantages import MODES, SCALES
from hypothesis import given, settings
from hypothesis import strategies as st

COMBINATIONS = [
    (mode, scale) for mode in MODES for scale in (*SCALES, None) if (mode, scale) != ("dvao", "none")
]


def test_check_vector():
    """Two binary rewards, totals (0, 1) and (0, 2): the sum forgets how many rewards were won."""
    rewards = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    half = 0.5**0.5
    summed = group_advantages(rewards, group_size=2, mode="scalarized")
    assert torch.allclose(summed, torch.tensor([-half, half, -half, half]), atol=1e-5)
    by_head = group_advantages(rewards, group_size=2, mode="per_head")
    assert torch.allclose(by_head, torch.tensor([-half, half, -2 * half, 2 * half]), atol=1e-5)
    standardised = group_advantages(rewards, group_size=2, mode="gdpo")
    assert torch.allclose(standardised, by_head / by_head.std(), atol=1e-5)


@pytest.mark.parametrize("sizes", [None, [3, 5, 8, 7, 1]], ids=["equal", "unequal"])
@pytest.mark.parametrize("mode,scale", COMBINATIONS)
def test_matches_reference(mode, scale, sizes):
    rewards = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    rewards[3, 1] = rewards[12, 0] = torch.nan
    rewards[5] = torch.nan  # nothing known of this sequence
    rewards[8:16, 2] = 1.3  # a head without signal
    rewards[16:] = 0.7  # a group without signal
    options = {
        "weights": [1.0, -0.5, 2.0],
        "mode": mode,
        "scale": scale,
        "group_sizes": sizes,
        "std_floor": 0.1,
    }
    found = group_advantages(rewards, **options)
    assert found.dtype == torch.float32 and found.shape == (24,) and found.isfinite().all()
    assert torch.allclose(found, reference.group_advantages(rewards, **options), atol=1e-6)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_shape(data):
    mode, scale = data.draw(st.sampled_from(COMBINATIONS))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    heads = data.draw(st.integers(1, 3))
    value = st.one_of(st.floats(-3, 3, width=16), st.just(float("nan")))
    rewards = torch.tensor([[data.draw(value) for _ in range(heads)] for _ in range(sum(sizes))])
    options = {"group_sizes": torch.tensor(sizes), "mode": mode, "scale": scale, "std_floor": 1e-3}
    found = group_advantages(rewards, **options)
    assert torch.allclose(found, reference.group_advantages(rewards, **options), atol=1e-4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 100.0, -7.7])
@pytest.mark.parametrize("mode", MODES)
def test_flat_groups_give_exactly_zero(mode, value):
    rewards = torch.cat([torch.full((8, 2), value), torch.randn(8, 2)])
    found = group_advantages(rewards, mode=mode)
    assert (found[:8] == 0).all() and (found[8:] != 0).all()


def test_rewards_that_cancel_are_flat():
    win = torch.rand(8)
    rewards = torch.stack([win, -win], 1)
    assert (group_advantages(rewards, mode="scalarized") == 0).all()


def test_std_floor_silences_small_spreads():
    rewards = torch.tensor([0.500, 0.501, 0.499, 0.500, 0.0, 1.0, 0.0, 1.0])
    found = group_advantages(rewards, group_size=4, mode="per_head", std_floor=0.01)
    assert (found[:4] == 0).all() and (found[4:].abs() > 0.8).all()


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 2.0, 6.0])
    found = group_advantages(rewards, group_size=3, mode="leave_one_out")
    assert torch.allclose(found, torch.tensor([-3.0, -1.5, 4.5]))


def test_missing_rewards_neither_help_nor_hurt():
    rewards = torch.tensor([[0.0, 1.0], [1.0, torch.nan], [2.0, 3.0], [1.0, 2.0]])
    filled = rewards.clone()
    filled[1, 1] = 2.0
    for mode in ("scalarized", "leave_one_out"):
        found = group_advantages(rewards, group_size=4, mode=mode)
        assert torch.allclose(found, group_advantages(filled, group_size=4, mode=mode))


@pytest.mark.parametrize("mode,scale", COMBINATIONS)
def test_negated_weights_negate_the_advantages(mode, scale):
    rewards = torch.randn(16, 3)
    options = {"mode": mode, "scale": scale}
    found = group_advantages(rewards, weights=[1.0, 2.0, 0.5], **options)
    assert torch.allclose(found, -group_advantages(rewards, weights=[-1.0, -2.0, -0.5], **options), atol=1e-6)


def test_no_sequences():
    assert group_advantages(torch.empty(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"group_size": 7}, "group_size must divide S = 16, got 7"),
        ({"group_sizes": [8, 7]}, "group_sizes must be positive and sum to S = 16, got a sum of 15"),
        ({"mode": "gdop"}, "mode must be one of .* got 'gdop'; did you mean 'gdpo'"),
        ({"scale": "bach"}, "scale must be one of .* did you mean 'batch'"),
        ({"mode": "dvao", "scale": "none"}, "mode 'dvao' divides"),
        ({"weights": [1.0]}, r"weights must have shape \(R,\) = \(2,\), got \(1,\)"),
        ({"std_floor": -1.0}, "std_floor and eps must be finite and not negative"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(16, 2), **options)


def test_infinite_rewards_are_refused():
    rewards = torch.zeros(8, 2)
    rewards[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"rewards must be finite or NaN, got \[0.0, inf\] in row 3"):
        group_advantages(rewards)
