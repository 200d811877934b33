"""The loss head in bfloat16 on the device, against float64: no further from it than eager PyTorch in bfloat16."""

import pytest
import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss, linear_grpo_loss, linear_logprob, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Ragged in every direction: one token, a tail of the vocabulary's tile, the vocabulary of Qwen2.5, an odd hidden size.
SHAPES = [(1, 64, 257), (33, 128, 1000), (300, 896, 151_936), (129, 72, 50_257)]
BACKENDS = ["torch", "triton"]


def problem(tokens: int, hidden: int, vocabulary: int, seed: int = 0):
    """Peaked rows, as a trained model has them; targets at both ends of the vocabulary and in its last tile."""
    draw = torch.Generator("cuda").manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=draw, device="cuda").bfloat16()
    w = (torch.randn(vocabulary, hidden, generator=draw, device="cuda") * 3 / hidden**0.5).bfloat16()
    targets = torch.randint(vocabulary, (tokens,), generator=draw, device="cuda")
    targets[0] = 0
    targets[-1] = vocabulary - 1
    return h, w, targets


def eager_logprob(h, w, targets):
    return torch.log_softmax(h @ w.T, dim=-1).gather(1, targets[:, None])[:, 0]


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_and_gradients(shape, backend):
    h, w, targets = problem(*shape)
    coefficient = torch.linspace(-1, 1, shape[0], device="cuda") + 0.1

    def run(function, dtype):
        a, b = (x.detach().to(dtype).requires_grad_() for x in (h, w))
        values = function(a, b)
        (values * coefficient.to(values.dtype)).sum().backward()
        return values.detach(), a.grad, b.grad

    truth = run(lambda a, b: reference.linear_logprob(a, b, targets)[0], torch.float64)
    eager = run(lambda a, b: eager_logprob(a, b, targets), torch.bfloat16)
    ours = run(lambda a, b: linear_logprob(a, b, targets, backend=backend)[0], torch.bfloat16)
    assert (ours[0].double() - truth[0]).abs().max() < 1e-4
    assert (ours[0].double() - truth[0]).abs().max() <= (eager[0].double() - truth[0]).abs().max() + 1e-6
    for mine, theirs, right in zip(ours[1:], eager[1:], truth[1:], strict=True):
        assert relative(mine, right) <= relative(theirs, right) + 5e-3
        assert relative(mine, right) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "cispo", "vespo"])
def test_loss_and_gradients(preset, backend):
    h, w, targets = problem(300, 896, 32_000)
    config = LossConfig.preset(preset)
    bounds = torch.tensor([0, 40, 41, 150, 300], dtype=torch.int32, device="cuda")
    advantages = torch.tensor([0.5, -1.0, 0.0, 2.0], device="cuda")
    old = reference.linear_logprob(h.double(), w.double(), targets)[0].float()
    old = old + 0.1 * torch.sin(torch.arange(300, device="cuda"))
    extra = {"old_logprobs": old, "ref_logprobs": old - 0.05, "cu_seqlens": bounds}

    def run(function, dtype, **more):
        a, b = (x.detach().to(dtype).requires_grad_() for x in (h, w))
        loss, metrics = function(a, b, targets, advantages.to(torch.float32), config, **extra, **more)
        loss.backward()
        return loss.detach(), a.grad, b.grad, metrics

    truth = run(reference.linear_grpo_loss, torch.float64)
    ours = run(linear_grpo_loss, torch.bfloat16, backend=backend)
    assert ours[0].item() == pytest.approx(truth[0].item(), rel=1e-3, abs=1e-5)
    assert relative(ours[1], truth[1]) < 1e-2 and relative(ours[2], truth[2]) < 1e-2
    assert all(torch.isfinite(value) for value in ours[3].values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_overflow_and_rows_far_below_zero(backend):
    h, w, targets = problem(16, 64, 1000)
    bias = torch.zeros(1000, device="cuda", dtype=torch.bfloat16)
    bias[3] = -torch.inf
    for scale, shift in ((1e3, 0.0), (1.0, -1e4)):
        values, entropy = linear_logprob(h * scale, w, targets, bias=bias + shift, backend=backend)
        right = reference.linear_logprob(
            (h * scale).double(), w.double(), targets, bias=(bias + shift).double()
        )
        keep = targets != 3
        torch.testing.assert_close(values[keep].double(), right[0][keep], rtol=1e-3, atol=1e-2)
        assert torch.isfinite(entropy).all()


def test_offsets_past_two_to_the_31_elements():
    """15,000 tokens × 151,936 entries: one chunk's last rows lie beyond what 32-bit offsets reach."""
    h, w, targets = problem(15_000, 64, 151_936)
    ours = linear_logprob(h, w, targets, backend="triton")[0]
    for first in (0, 14_900):
        part = slice(first, first + 100)
        right = reference.linear_logprob(h[part].double(), w.double(), targets[part])[0]
        assert (ours[part].double() - right).abs().max() < 1e-4


def test_loss_of_logprobs_and_advantages_equal_the_reference():
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(64, 4, generator=draw)
    rewards[3, 1] = torch.nan
    for mode in ("scalarized", "per_head", "gdpo", "dvao", "leave_one_out"):
        ours = group_advantages(rewards.cuda(), group_size=8, mode=mode)
        right = reference.group_advantages(rewards.double(), group_size=8, mode=mode)
        torch.testing.assert_close(ours.cpu().double(), right.double(), rtol=1e-4, atol=1e-5)
    logprobs = -torch.rand(500, generator=draw).cuda() * 4
    ours, _ = grpo_loss(
        logprobs, torch.ones(500, device="cuda"), LossConfig.preset("dapo"), old_logprobs=logprobs - 0.1
    )
    right, _ = reference.grpo_loss(
        logprobs.double(),
        torch.ones(500, device="cuda"),
        LossConfig.preset("dapo"),
        old_logprobs=logprobs.double() - 0.1,
    )
    assert ours.item() == pytest.approx(right.item(), rel=1e-5)
