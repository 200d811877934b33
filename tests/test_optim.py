"""The optimizer step: float32 masters, clipping, schedules, non-finite gradients."""

import copy
import math

import pytest
import torch

from grpo_fast.optim import Optimizer, learning_rate


def test_learning_rate_warms_up_and_decays():
    settings = {"lr": 1.0, "warmup_steps": 4, "total_steps": 14}
    assert [learning_rate(s, schedule="constant", **settings) for s in range(5)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]
    assert learning_rate(9, schedule="cosine", **settings) == pytest.approx(0.5)
    assert learning_rate(9, schedule="linear", **settings) == pytest.approx(0.5)
    assert learning_rate(14, schedule="cosine", **settings) == pytest.approx(0.0)
    assert learning_rate(0, lr=1.0, warmup_steps=0, total_steps=1, schedule="cosine") == 1.0


def test_bfloat16_parameters_learn_steps_smaller_than_their_rounding():
    """A step of 1e-4 on a weight of 1 is lost in bfloat16 (spacing 2^-7); the float32 master adds them up."""
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = Optimizer([weight], lr=1e-4, max_grad_norm=1e9)
    for _ in range(100):
        weight.sum().backward()
        assert weight.grad is None  # its gradient has moved to the master
        optimizer.step(1e-4)
    assert torch.allclose(optimizer.masters[0], torch.full((4, 4), 0.99), atol=1e-4)
    assert torch.equal(weight.detach(), optimizer.masters[0].detach().bfloat16())


def test_gradients_of_micro_batches_add_up_in_float32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer([weight], lr=0.0, max_grad_norm=1e9)
    (weight * 256).sum().backward()
    for _ in range(8):
        (weight * 0.5).sum().backward()  # below bfloat16's spacing at 256
    assert optimizer.masters[0].grad is not None
    assert optimizer.masters[0].grad.item() == 260.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(bad):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step(0.1)
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.inner.state_dict())
    (weight * bad).sum().backward()
    norm, taken = optimizer.step(0.1)
    assert not taken and not math.isfinite(norm) and optimizer.skipped_steps == 1
    assert torch.equal(weight.detach(), before) and weight.grad is None
    assert torch.equal(optimizer.inner.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


def test_gradients_are_clipped_to_the_norm_unless_it_is_zero():
    for limit, expected in ((1.0, 1.0), (0.0, 10.0)):
        weight = torch.nn.Parameter(torch.zeros(4, 25))
        optimizer = Optimizer([weight], lr=1.0, max_grad_norm=limit, betas=(0.0, 0.0))
        weight.sum().backward()
        norm, _ = optimizer.step(0.0)
        assert norm == pytest.approx(10.0)
        assert optimizer.inner.state_dict()["state"][0]["exp_avg"].norm().item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_restores_the_next_step_exactly(dtype):
    def fresh():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5, 3).to(dtype))
        return weight, Optimizer([weight], lr=0.01)

    def take(weight, optimizer, steps):
        for _ in range(steps):
            (weight.float() ** 3).sum().backward()
            optimizer.step(0.01)

    straight, optimizer = fresh()
    take(straight, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    weights = straight.detach().clone()
    take(straight, optimizer, 2)

    resumed, second = fresh()
    with torch.no_grad():
        resumed.copy_(weights)
    second.load_state_dict(state)
    take(resumed, second, 2)
    assert torch.equal(straight.detach(), resumed.detach())
