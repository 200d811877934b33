"""Edges that only a changed line of the operations showed to be untested (`python -m tests.endurance.mutants`)."""

import sys
from typing import Any, cast

import grpo_kernels._torch_head as torch_head
import pytest
import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss, linear_grpo_loss, linear_logprob, reference


def test_metrics_of_a_call_without_any_active_token_are_zero() -> None:
    lp = torch.tensor([-1.0, -2.0], requires_grad=True)
    config = LossConfig.preset("dapo")
    _, metrics = grpo_loss(
        lp,
        torch.ones(2),
        config,
        loss_mask=torch.zeros(2, dtype=torch.bool),
        rollout_logprobs=lp.detach() - 1,
    )
    assert metrics and all(value.item() == 0.0 for value in metrics.values()), metrics


@pytest.mark.parametrize("name", ["softcap", "temperature"])
@pytest.mark.parametrize("value", [0.0, -0.5, float("inf"), float("nan")])
def test_divisors_of_the_head_are_positive_and_finite(name: str, value: float) -> None:
    hidden, weight, targets = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        linear_logprob(hidden, weight, targets, **cast(Any, {name: value}))


def test_groups_of_one_are_allowed_and_have_no_advantage() -> None:
    assert group_advantages(torch.tensor([1.0, 2.0, 5.0]), group_size=1).tolist() == [0.0, 0.0, 0.0]
    for bad in (0, -1, 2):
        with pytest.raises(ValueError, match="group_size must divide"):
            group_advantages(torch.ones(3), group_size=bad)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_gradients_are_multiplied_by_whatever_the_loss_is(factor: float) -> None:
    draw = torch.Generator().manual_seed(0)
    found = []
    for operation in (linear_grpo_loss, reference.linear_grpo_loss):
        draw.manual_seed(0)
        hidden = torch.randn(5, 4, generator=draw, dtype=torch.float64).requires_grad_()
        weight = torch.randn(7, 4, generator=draw, dtype=torch.float64).requires_grad_()
        targets, advantages = torch.arange(5), torch.randn(5, generator=draw, dtype=torch.float64)
        loss, _ = operation(hidden, weight, targets, advantages, LossConfig.preset("dapo"))
        (factor * loss).backward()
        found.append((hidden.grad, weight.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("value", ["auto", "torch"])
def test_a_shared_vocabulary_is_computed_in_torch_only(value: str) -> None:
    hidden, weight, targets = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    group = cast(Any, object())
    for refused in ("triton", "fused"):
        with pytest.raises(ValueError, match="backend must be auto or torch with vocab_group"):
            linear_logprob(hidden, weight, targets, backend=refused, vocab_group=group)
    with pytest.raises(Exception, match=r"(?s)^(?!.*must be auto or torch)"):  # a group that is none
        linear_logprob(hidden, weight, targets, backend=value, vocab_group=group)


def test_chunks_as_long_as_the_hidden_size_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that couple tokens take a first pass over all chunks, whatever the numbers happen to be."""
    monkeypatch.setattr(torch_head, "MOST_ROWS", 4)
    found = []
    for operation in (linear_grpo_loss, reference.linear_grpo_loss):
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(8, 4, generator=draw, dtype=torch.float64).requires_grad_()
        weight = torch.randn(7, 4, generator=draw, dtype=torch.float64).requires_grad_()
        advantages = torch.randn(2, generator=draw, dtype=torch.float64)
        targets, bounds = torch.arange(8) % 7, torch.tensor([0, 3, 8])
        loss, _ = operation(hidden, weight, targets, advantages, LossConfig.preset("gspo"), cu_seqlens=bounds)
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_the_host_leaves_out_what_it_knows_to_count_for_nothing() -> None:
    """What lies on the GPU is not waited for: such tokens are computed, and weighed with nothing."""
    known = sys.modules["grpo_kernels.linear_grpo_loss"]._known_active
    on_policy = LossConfig.preset("dapo")
    anchored = LossConfig.preset("grpo", kl_coef=0.1)  # a token without advantage is pulled back all the same
    token, sequence = torch.tensor([1.0, 0.0, -2.0, 0.0]), torch.tensor([0.0, 3.0])
    bounds, mask = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([1, 1, 0, 2])
    away = torch.device("meta")
    for config, advantages, loss_mask, cu_seqlens, expected in (
        (on_policy, token, None, None, [True, False, True, False]),
        (on_policy, token, mask, None, [True, False, False, False]),
        (on_policy, token, mask != 0, bounds, [True, False, False, False]),
        (on_policy, sequence, None, bounds, [False, True, True, True]),
        (on_policy, sequence, mask, bounds, [False, True, False, True]),
        (on_policy, sequence, mask, bounds.to(away), [True, True, False, True]),
        (on_policy, token.to(away), mask, None, [True, True, False, True]),
        (on_policy, token, mask.to(away), None, [True, False, True, False]),
        (anchored, token, mask, None, [True, True, False, True]),
        (anchored, sequence, None, bounds, [True] * 4),
    ):
        assert known(config, 4, advantages, loss_mask, cu_seqlens).tolist() == expected


def test_a_threshold_below_zero_is_refused() -> None:
    assert LossConfig(off_policy_threshold=0.0).off_policy_threshold == 0.0
    with pytest.raises(ValueError, match=r"off_policy_threshold must be not negative; got -0\.5"):
        LossConfig(off_policy_threshold=-0.5)


def test_blocks_of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the smallest nor the whole vocabulary, and no whole number of bytes in a row."""
    monkeypatch.setattr(torch_head, "BLOCK_BYTES", 4 * 4 * 300 + 8)
    hidden, weight = torch.randn(4, 3), torch.randn(1000, 3)
    targets = torch.tensor([0, 299, 300, 999])
    for found, true in zip(
        linear_logprob(hidden, weight, targets, backend="torch"),
        reference.linear_logprob(hidden.double(), weight.double(), targets),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), true, atol=1e-5, rtol=0)
