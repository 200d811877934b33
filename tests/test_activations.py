"""Saved tensors kept on the host: the same gradients, weights left alone, each stretch of memory moved once."""

import copy
from functools import partial

import pytest
import torch

from grpo_fast.models import activations
from grpo_fast.models import policy as policies
from grpo_fast.models.activations import activations_on_host
from grpo_fast.models.policy import LoraSettings
from tests.test_grpo import config, gradients, policy, rollout


@pytest.fixture
def moved(monkeypatch) -> list[torch.Tensor]:
    """What is moved, in order."""
    found: list[torch.Tensor] = []
    store = activations._Mover._store

    def recorded(self, flat):
        found.append(flat)
        return store(self, flat)

    monkeypatch.setattr(activations._Mover, "_store", recorded)
    return found


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_without_it_to_the_last_bit(monkeypatch, moved, checkpointing, lora):
    monkeypatch.setattr(policies, "activations_on_host", partial(activations_on_host, min_bytes=256))
    model, settings = policy(lora=lora, gradient_checkpointing=checkpointing), config("dapo", 50)
    wanted, _ = gradients(model, rollout(), settings)
    assert not moved
    other = copy.deepcopy(model)
    other.activations_on_host = True
    found, _ = gradients(other, rollout(), settings)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items()) and wanted
    layers, hidden = 2, 32
    rows = [tensor for tensor in moved if tensor.numel() % hidden == 0]
    if checkpointing:  # the input of each layer, and what the ends of the model save
        assert layers <= len(rows) <= len(moved) <= 2 * (layers + 6)
    else:
        assert len(moved) > 2 * layers * 8


def test_without_gradients_nothing_is_moved(monkeypatch, moved):
    monkeypatch.setattr(policies, "activations_on_host", partial(activations_on_host, min_bytes=1))
    from grpo_fast.grpo import packed

    model = policy()
    model.activations_on_host = True
    (batch,) = packed(rollout(), [0, 1], model, 8192)
    model.logprobs(batch)
    assert not moved


def test_weights_small_tensors_and_expanded_ones_stay(moved):
    weight = torch.randn(64, 64, requires_grad=True)
    inputs = torch.randn(64, 64, requires_grad=True)
    with activations_on_host([weight], min_bytes=64 * 64 * 4):
        out = (inputs @ weight.t()) * torch.ones(1, 64).expand(64, 64)
        small = out[0].exp()
    (out.sum() + small.sum()).backward()
    assert [tensor.numel() for tensor in moved] == [64 * 64]  # `inputs` alone
    assert moved[0].data_ptr() == inputs.data_ptr()


def test_what_several_operations_save_is_moved_once_and_every_view_of_it(moved):
    inputs = torch.randn(6, 8, 4, dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()  # saves y, and so do the rest, as other views of it
        return (y.square() + y.transpose(0, 2).square().transpose(0, 2)).sum() + (y[:, 1:5] ** 3).sum()

    (wanted,) = torch.autograd.grad(f(inputs), inputs)
    with activations_on_host([], min_bytes=1):
        value = f(inputs)
    (found,) = torch.autograd.grad(value, inputs)
    assert torch.equal(found, wanted)
    assert [tensor.numel() for tensor in moved] == [6 * 8 * 4, 6 * 4 * 4]  # y, and the gap-ridden slice of it


def test_memory_that_has_a_new_owner_is_moved_again():
    """The caching of stretches must not take a freed tensor's address for the tensor."""
    inputs = torch.randn(4096, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):  # each saved result may get the place of the one before it
            x = torch.sin(x).exp()
        return x.sum()

    (wanted,) = torch.autograd.grad(f(inputs), inputs)
    with activations_on_host([], min_bytes=1):
        value = f(inputs)
    (found,) = torch.autograd.grad(value, inputs)
    assert torch.equal(found, wanted)


def test_a_graph_can_be_gone_through_twice():
    inputs = torch.randn(512, requires_grad=True)
    with activations_on_host([], min_bytes=1):
        value = inputs.exp().square().sum()
    first = torch.autograd.grad(value, inputs, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, inputs)[0])
