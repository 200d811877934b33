"""The kernels of grpo_loss and group_advantages on a CUDA device, at sizes of a training step."""

from typing import Any

import pytest
import torch
from grpo_kernels import group_advantages, grpo_loss, reference
from grpo_kernels.group_advantages import MODES
from kernel_oracles import LOSSES, normalizer_of
from torch import Tensor

DEVICE = "cuda"
COUNT = 200_000
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def arguments(dtype: torch.dtype) -> dict[str, Any]:
    """Sequences from none to a third of the tokens; ratios about one, and a few far off."""
    make = torch.Generator().manual_seed(0)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(COUNT, generator=make, dtype=torch.float64)

    logprobs = -4 * torch.rand(COUNT, generator=make, dtype=torch.float64)
    old = logprobs + normal(0.3)
    old[::1000] += 25.0
    values = {"logprobs": logprobs, "advantages": normal(1.0), "old_logprobs": old, "entropy": -logprobs}
    values |= {"ref_logprobs": logprobs + normal(0.5), "rollout_logprobs": old + normal(0.2)}
    given: dict[str, Any] = {name: value.float().to(dtype).to(DEVICE) for name, value in values.items()}
    bounds = torch.cat([torch.tensor([0, 0, 1, COUNT // 3]), torch.arange(COUNT // 2, COUNT, 997)])
    given["cu_seqlens"] = torch.cat([bounds, torch.tensor([COUNT])]).int().to(DEVICE)
    given["loss_mask"] = (torch.rand(COUNT, generator=make) > 0.1).to(DEVICE)
    return given


def run(name: str, dtype: torch.dtype, backend: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    given = arguments(dtype)
    logprobs = given.pop("logprobs").requires_grad_()
    entropy = given.pop("entropy").requires_grad_()
    normalizer = normalizer_of(LOSSES[name])
    loss, metrics = grpo_loss(
        logprobs,
        given.pop("advantages"),
        LOSSES[name],
        entropy=entropy,
        normalizer=normalizer,
        backend=backend,
        **given,
    )
    gradients = torch.autograd.grad(loss, [logprobs, entropy], allow_unused=True)
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)], metrics


@pytest.mark.parametrize("name", LOSSES)
def test_grpo_loss(name):
    truth, true_metrics = run(name, torch.float64, "torch")
    found, metrics = run(name, torch.float32, "triton")
    again, _ = run(name, torch.float32, "triton")
    for value, same, true in zip(found, again, truth, strict=True):
        assert torch.equal(value, same)
        off = (value.double() - true).norm() / true.norm()
        # A ratio that float32 rounds to the other side of a clip changes one token's gradient.
        assert off <= (1e-2 if value.ndim else 1e-4), off
        assert ((value.double() - true).abs() > 1e-4 * true.abs().max()).double().mean() <= 1e-4
    assert metrics.keys() == true_metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(value.double(), true_metrics[key].double(), rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("sizes", [[8] * 512, [1000, 1, 24, 777]], ids=["equal", "unequal"])
@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("mode", MODES)
def test_group_advantages(mode, scale, sizes):
    rewards = 100 + torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(0))
    rewards[rewards > 101.5] = torch.nan
    options: dict[str, Any] = {
        "mode": mode,
        "scale": scale,
        "group_sizes": sizes,
        "weights": [1, 2, 3, -1, 0.5],
    }
    found = group_advantages(rewards.to(DEVICE), backend="triton", **options)
    true = reference.group_advantages(rewards, **options)
    torch.testing.assert_close(found.cpu(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "entropy-quantile"])
def test_nothing_waits_for_the_device(name):
    given = arguments(torch.float32)
    logprobs, advantages = given.pop("logprobs").requires_grad_(), given.pop("advantages")
    rewards = torch.randn(64, 3, device=DEVICE)
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = grpo_loss(logprobs, advantages, LOSSES[name], backend="triton", **given)
            loss.backward()
            group_advantages(rewards, weights=[1.0, 0.5, 2.0], mode="gdpo", scale="batch", backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
