"""The optimizer step: float32 masters, clipping, schedules, non-finite gradients, states on the host."""

import copy
import math

import pytest
import torch

from grpo_fast.optim.optimizer import Optimizer, learning_rate


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


def layers(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


def trained(
    model: torch.nn.Module, optimizer: Optimizer, steps: int, *, offload: bool = False, first: int = 0
):
    """`steps` steps of two micro-batches each, between which nothing may change."""
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        optimizer.reload()
        for _ in range(2):
            inputs = torch.randn(16, 6, generator=draw).to(next(model.parameters()).dtype)
            model(inputs).float().square().sum().backward()
        optimizer.step(0.01)
        if offload:
            optimizer.offload()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["while_training", "host"])
def test_where_the_states_live_changes_no_bit(where, dtype, kind):
    plain, moved = layers(dtype), layers(dtype)
    wanted = trained(plain, Optimizer(plain.parameters(), lr=0.01, kind=kind), 4)
    optimizer = Optimizer(moved.parameters(), lr=0.01, kind=kind, where=where)
    found = trained(moved, optimizer, 4, offload=True)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert all(p.grad is None for p in moved.parameters())


def test_an_offloaded_optimizer_holds_no_memory_of_its_device():
    model = layers(torch.bfloat16)
    optimizer = Optimizer(model.parameters(), lr=0.01, where="while_training")
    trained(model, optimizer, 2)
    held = [
        *optimizer.masters,
        *(s[name] for s in optimizer.inner.state.values() for name in ("exp_avg", "exp_avg_sq")),
    ]
    before, saved = [t.detach().clone() for t in held], copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        optimizer.offload()
        assert all(t.untyped_storage().nbytes() == 0 for t in held)
    away = optimizer.state_dict()  # read from the host: the device gets nothing back for it
    assert all(t.untyped_storage().nbytes() == 0 for t in held)
    for index, master in saved["masters"].items():
        assert torch.equal(away["masters"][index], master)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(
                away["inner"]["state"][int(index)][name], saved["inner"]["state"][int(index)][name]
            )
    optimizer.reload()
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_offload_is_for_those_that_ask_for_it():
    model = layers(torch.bfloat16)
    optimizer = Optimizer(model.parameters(), lr=0.01)
    optimizer.offload()
    assert all(m.untyped_storage().nbytes() > 0 for m in optimizer.masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("before", "after"), [("device", "host"), ("host", "device"), ("while_training", "host")]
)
def test_a_saved_state_goes_on_wherever_it_lives_next(dtype, before, after):
    straight = layers(dtype)
    wanted = trained(straight, Optimizer(straight.parameters(), lr=0.01), 5)
    first = layers(dtype)
    optimizer = Optimizer(first.parameters(), lr=0.01, where=before)
    weights = trained(first, optimizer, 3, offload=True)
    resumed = layers(dtype)
    second = Optimizer(resumed.parameters(), lr=0.01, where=after)
    with torch.no_grad():
        for parameter, weight in zip(resumed.parameters(), weights, strict=True):
            parameter.copy_(weight)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = trained(resumed, second, 2, first=3)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_discarded_gradients_leave_no_trace(dtype, where):
    clean, dirty = layers(dtype), layers(dtype)
    wanted = trained(clean, Optimizer(clean.parameters(), lr=0.01), 2)
    optimizer = Optimizer(dirty.parameters(), lr=0.01, where=where)
    (dirty(torch.ones(4, 6, dtype=dtype)).sum() * 100).backward()
    next(dirty.parameters()).grad = torch.ones(
        8, 6, dtype=dtype
    )  # left where memory ran out in the hook itself
    optimizer.discard()
    found = trained(dirty, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_loss_that_is_not_finite_skips_the_step_though_the_gradient_is_and_leaves_it_unclipped():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([weight], lr=0.1)
    for loss in (torch.tensor(math.nan), math.inf):
        weight.grad = torch.full((3,), 7.0)
        assert optimizer.step(0.1, loss=loss) == (pytest.approx(7 * 3**0.5), False)
        assert weight.grad is None and torch.equal(weight.data, torch.ones(3)) and optimizer.nonfinite == [0]
    weight.grad = torch.tensor([1.0, math.inf, math.nan])
    assert optimizer.step(0.1)[1] is False and optimizer.nonfinite == [2]
    assert optimizer.skipped_steps == 3
