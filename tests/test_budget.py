"""Out of memory in a micro-batch: the step is redone in smaller ones with the same gradient, counted and told."""

import copy
from dataclasses import replace

import pytest
import torch

from grpo_fast.budget import TokenBudget
from grpo_fast.config.settings import OptimSettings, TrainConfig
from grpo_fast.errors import UserError
from grpo_fast.grpo import update
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.optim.optimizer import Optimizer
from tests.test_grpo import config, policy, rollout

LARGE = 8192


def optimizer_of(model: Policy, **options) -> Optimizer:
    """With a large eps an update is nearly proportional to the gradient, and rounding stays rounding."""
    return Optimizer(model.trainable_parameters(), lr=0.1, eps=1.0, max_grad_norm=1e9, **options)


def weights_after(model: Policy, settings: TrainConfig, budget: TokenBudget, steps: int = 2, **options):
    model = copy.deepcopy(model)
    optimizer = optimizer_of(model, **options)
    metrics = [
        update(model, optimizer, rollout(seed=step), settings, lr=0.1, budget=budget) for step in range(steps)
    ]
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, metrics


def fails_at(monkeypatch: pytest.MonkeyPatch, *calls: int, backward: bool = False) -> list[int]:
    """Let the policy's forward (or the backward through it) run out of memory at its n-th calls; tokens of each."""
    seen: list[int] = []
    forward = Policy.forward

    def failing(self, batch, *args, **kwargs):
        seen.append(batch.input_ids.shape[1])
        loss, metrics = forward(self, batch, *args, **kwargs)
        if len(seen) - 1 in calls:
            if not backward:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            loss.register_hook(lambda _: raise_(torch.OutOfMemoryError("CUDA out of memory.")))
        return loss, metrics

    monkeypatch.setattr(Policy, "forward", failing)
    return seen


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("calls", [(0,), (1,), (3,)])
def test_the_redone_step_has_the_gradient_of_an_undisturbed_one(monkeypatch, calls, where, backward):
    model, settings = policy(), config("dapo")
    large, _ = weights_after(model, settings, TokenBudget(LARGE))
    start = 50  # two micro-batches a step: a failure finds gradients of the first one there already
    with monkeypatch.context() as patched:
        seen = fails_at(patched, *calls, backward=backward)
        budget = TokenBudget(start)
        disturbed, metrics = weights_after(model, settings, budget, where=where)
    assert budget.tokens < start and len(seen) > len(calls) + 2
    assert sum(row["oom_retries"] for row in metrics) == budget.retries == len(calls)
    again, _ = weights_after(model, settings, TokenBudget(budget.tokens))
    for name, weight in disturbed.items():
        torch.testing.assert_close(weight, large[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(weight, again[name], rtol=0, atol=1e-6)
    assert any((large[name] - p).abs().max() > 1e-4 for name, p in model.named_parameters())


def test_the_first_step_is_exactly_the_one_of_the_smaller_budget(monkeypatch):
    model, settings, budget = policy(), config("grpo", kl_coef=0.0), TokenBudget(LARGE)
    with monkeypatch.context() as patched:
        fails_at(patched, 0)
        disturbed, metrics = weights_after(model, settings, budget, steps=1)
    plain, wanted = weights_after(model, settings, TokenBudget(budget.tokens), steps=1)
    assert all(torch.equal(disturbed[name], plain[name]) for name in plain)
    assert {**metrics[0], "oom_retries": 0} == wanted[
        0
    ]  # nothing of the failed attempt is in the metrics either


def test_bfloat16_masters_forget_the_failed_attempt(monkeypatch):
    model = policy()
    model.model.to(torch.bfloat16)  # pyright: ignore
    budget = TokenBudget(50)
    with monkeypatch.context() as patched:
        fails_at(patched, 1)
        disturbed, _ = weights_after(model, config("dapo"), budget, steps=1)
    plain, _ = weights_after(model, config("dapo"), TokenBudget(budget.tokens), steps=1)
    assert all(torch.equal(disturbed[name], plain[name]) for name in plain)


def test_old_and_reference_logprobs_serve_the_smaller_micro_batches(monkeypatch):
    """With several updates the old policy is gone when memory runs out: its log-probs must have been kept."""
    model = policy(lora=LoraSettings(rank=4))
    settings = config("grpo")
    settings = replace(settings, optim=OptimSettings(updates_per_rollout=3, minibatches=2))
    large, wanted = weights_after(model, settings, TokenBudget(LARGE), steps=1)
    with monkeypatch.context() as patched:
        fails_at(patched, 3)
        disturbed, metrics = weights_after(model, settings, TokenBudget(LARGE), steps=1)
    assert metrics[0]["oom_retries"] == 1
    assert metrics[0]["kl"] == pytest.approx(wanted[0]["kl"], rel=1e-4) and wanted[0]["kl"] > 1e-8
    for name, weight in disturbed.items():
        torch.testing.assert_close(weight, large[name], rtol=0, atol=1e-6)


def test_a_pass_without_gradients_is_redone_too(monkeypatch):
    model, calls = policy(), []
    settings = replace(config("dapo"), optim=OptimSettings(updates_per_rollout=2))
    wanted, _ = weights_after(model, settings, TokenBudget(LARGE), steps=1)
    logprobs = Policy.logprobs

    def failing(self, batch, **kwargs):
        calls.append(batch)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logprobs(self, batch, **kwargs)

    monkeypatch.setattr(Policy, "logprobs", failing)
    found, metrics = weights_after(model, settings, TokenBudget(LARGE), steps=1)
    assert metrics[0]["oom_retries"] == 1 and len(calls) > 2
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-6)


def test_the_smaller_budget_is_remembered_and_told_once(monkeypatch):
    told: list[str] = []
    model, settings, budget = policy(), config("dapo"), TokenBudget(LARGE, tell=told.append)
    seen = fails_at(monkeypatch, 0, 1)
    weights_after(model, settings, budget)
    largest = seen[0]
    assert largest > max(seen[2:]) and budget.retries == 2 and budget.tokens <= max(largest // 4, 30)
    assert len(told) == 1 and f"--optim.token-budget {budget.tokens}" in told[0]


def test_one_sequence_that_does_not_fit_ends_the_run_with_advice(monkeypatch):
    model, budget = policy(), TokenBudget(LARGE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = fails_at(monkeypatch, *range(1000))
    optimizer = optimizer_of(model)
    with pytest.raises(UserError, match="gradient_checkpointing") as raised:
        update(model, optimizer, rollout(), config("dapo"), lr=0.1, budget=budget)
    assert "\n" not in str(raised.value) and "rollout.max_new_tokens" in str(raised.value)
    assert len(seen) < 10 and f"micro-batch of {seen[-1]} tokens" in str(raised.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_other_errors_are_no_reason_to_go_on(monkeypatch):
    monkeypatch.setattr(Policy, "forward", lambda *_, **__: raise_(RuntimeError("DefaultCPUAllocator")))
    model, budget = policy(), TokenBudget(LARGE)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        update(model, optimizer_of(model), rollout(), config("dapo"), lr=0.1, budget=budget)
    assert budget.retries == 0


def test_out_of_memory_in_the_optimizer_is_one_line(monkeypatch):
    model = policy()
    optimizer = optimizer_of(model)
    monkeypatch.setattr(
        optimizer.inner, "step", lambda: raise_(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(UserError, match="optimizer host"):
        update(model, optimizer, rollout(), config("dapo"), lr=0.1)
