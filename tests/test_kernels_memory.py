"""Nothing of size N×V is ever allocated: the allocator's own events at the vocabulary of a real model."""

from typing import Any

import grpo_kernels._torch_head as torch_head
import pytest
import torch
from grpo_kernels import LossConfig, linear_grpo_loss, linear_logprob, reference
from torch.profiler import ProfilerActivity, profile

N, H, V = 640, 8, 150_001
LOGITS = N * V * 4


def _allocations(run):
    """Largest single allocation and highest sum of live ones, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    events: list[Any] = watched.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    live = highest = 0
    for size in sizes:
        live += size
        highest = max(highest, live)
    return max(sizes), highest


def _inputs():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=random).requires_grad_()
    weight = torch.randn(V, H, generator=random).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=random), torch.linspace(-1, 1, N)


def _run_loss(frozen, config):
    hidden, weight, targets, advantages = _inputs()
    weight.requires_grad_(not frozen)
    cu_seqlens = torch.tensor([0, N // 2, N])
    loss, _ = linear_grpo_loss(hidden, weight, targets, advantages, config, cu_seqlens=cu_seqlens)
    loss.backward()


def _run_logprob(trained):
    hidden, weight, targets, _ = _inputs()
    if not trained:
        with torch.no_grad():
            linear_logprob(hidden, weight, targets)
        return
    logprobs, entropy = linear_logprob(hidden, weight, targets)
    (logprobs.sum() + entropy.sum()).backward()


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda: _run_loss(False, LossConfig.preset("dapo")), id="trained"),
        pytest.param(lambda: _run_loss(False, LossConfig.preset("gspo")), id="two phases"),
        pytest.param(lambda: _run_loss(True, LossConfig.preset("dapo")), id="frozen"),
        pytest.param(
            lambda: _run_loss(False, LossConfig.preset("dapo", entropy_coef=0.1)), id="entropy bonus"
        ),
        pytest.param(lambda: _run_logprob(False), id="forward"),
        pytest.param(lambda: _run_logprob(True), id="log-probs trained"),
    ],
)
def test_no_logits_in_memory(run):
    largest, highest = _allocations(run)
    assert largest <= torch_head.SCRATCH_BYTES < LOGITS
    # scratch, a few blocks, and float32 gradients of the weight; no second scratch
    assert highest <= torch_head.SCRATCH_BYTES * 1.1 + 4 * V * H * 4 + 8 * torch_head.BLOCK_BYTES


def test_the_watch_sees_logits():
    """The same measure on the plain way: it does allocate them."""
    hidden, weight, targets, _ = _inputs()
    largest, _ = _allocations(lambda: reference.linear_logprob(hidden, weight, targets))
    assert largest >= LOGITS
