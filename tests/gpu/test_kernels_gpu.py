"""The operations on a CUDA device, every backend.

The criterion: truth is float64 on the same numbers, the yardstick is plain PyTorch in the same dtype, and ours
may be no further from the truth than the yardstick is, plus a small tolerance.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss, linear_grpo_loss, linear_logprob, reference
from torch import Tensor

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BACKENDS = ["torch", "triton", "fused"]
# relative to the norm of the truth: log-probs and entropies, gradients
SLACK = {torch.bfloat16: (1e-5, 2e-3), torch.float16: (1e-5, 5e-4), torch.float32: (1e-5, 1e-5)}


def problem(
    count: int, width: int, vocabulary: int, dtype: torch.dtype, *, bias: bool = False
) -> tuple[list[Tensor], Tensor]:
    """[hidden, weight(, bias)] with peaked logits, and targets that hold the first and the last token."""
    generator = torch.Generator(DEVICE).manual_seed(count + vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    leaves = [normal(count, width) * 3.0 * width**-0.5, normal(vocabulary, width)]
    if bias:
        leaves.append(normal(vocabulary))
    targets = torch.randint(0, vocabulary, (count,), generator=generator, device=DEVICE)
    targets[0], targets[-1] = 0, vocabulary - 1
    return [leaf.to(dtype) for leaf in leaves], targets


def outputs(
    function: Callable[..., Any],
    leaves: list[Tensor],
    targets: Tensor,
    by: tuple[Tensor, Tensor | None],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Log-probs, entropies and gradients of by[0] @ logprobs + by[1] @ entropy, all float64."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    if len(leaves) > 2:
        options = options | {"bias": leaves[2]}
    logprobs, entropy = function(leaves[0], leaves[1], targets, **options)
    total = logprobs @ by[0].to(logprobs.dtype)
    if by[1] is not None:
        total = total + entropy @ by[1].to(entropy.dtype)
    values = [logprobs, entropy, *torch.autograd.grad(total, leaves)]
    names = ["logprobs", "entropy", "d_hidden", "d_weight", "d_bias"]
    return {name: value.detach().double() for name, value in zip(names, values, strict=False)}


def off(found: Tensor, true: Tensor) -> float:
    assert not found.isnan().any()
    return ((found - true).norm() / true.norm().clamp(min=1e-30)).item()


def assert_as_good_as_eager(
    leaves: list[Tensor], targets: Tensor, backend: str, *, entropy: bool = False, **options: Any
) -> None:
    by = torch.linspace(-1.0, 2.0, len(targets), device=DEVICE)
    weights = (by, by.flip(0) if entropy else None)
    truth = outputs(reference.linear_logprob, [leaf.double() for leaf in leaves], targets, weights, options)
    eager = outputs(reference.linear_logprob, leaves, targets, weights, options)
    ours = outputs(linear_logprob, leaves, targets, weights, options | {"backend": backend})
    for name, true in truth.items():
        slack = SLACK[leaves[0].dtype][name.startswith("d_")]
        limit = off(eager[name], true) + slack
        assert off(ours[name], true) <= limit, f"{name}: {off(ours[name], true):.2e} > {limit:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize(
    ("count", "width", "vocabulary"),
    # one token; an odd vocabulary; a ragged one of Qwen2.5; more tokens than a chunk
    [(1, 64, 1000), (257, 96, 50257), (513, 128, 151936), (4500, 64, 32003)],
)
def test_linear_logprob(count, width, vocabulary, dtype, backend):
    leaves, targets = problem(count, width, vocabulary, dtype)
    assert_as_good_as_eager(leaves, targets, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["logprobs", "entropy"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"softcap": 3.0},
        {"bias": True, "softcap": 5.0, "logit_scale": 0.5},
        {"bias": True},
    ],
    ids=str,
)
def test_options(options, entropy, dtype, backend):
    options = dict(options)
    leaves, targets = problem(300, 64, 5003, dtype, bias=options.pop("bias", False))
    if len(leaves) > 2 and "softcap" not in options:
        leaves[2][5] = leaves[2][5001] = -torch.inf
        targets[(targets == 5) | (targets == 5001)] = 6
    assert_as_good_as_eager(leaves, targets, backend, entropy=entropy, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["logprobs", "entropy"])
def test_adversarial_rows(entropy, dtype, backend):
    size = 1003
    logits = torch.randn(8, size, device=DEVICE)
    logits[0] = 1e4 * torch.where(torch.arange(size, device=DEVICE) % 2 == 0, 1.0, -1.0)
    logits[1] = 3.0
    logits[2] = -1e4
    logits[3] = -1e4
    logits[3, -1] = -50.0
    logits[4] -= 200.0
    logits[5, 0] = 90.0
    logits[6, 7] = 1e4
    logits[7, 7] = 38.0
    targets = torch.tensor([1, size - 1, 0, size - 1, 30, 60, 7, 8], device=DEVICE)
    leaves = [logits.to(dtype), torch.eye(size, device=DEVICE, dtype=dtype)]
    assert_as_good_as_eager(leaves, targets, backend, entropy=entropy)


def test_targets_out_of_range_give_nan_and_nothing_worse():
    leaves, targets = problem(64, 32, 1000, torch.bfloat16)
    targets[3], targets[9] = -100, 2**40
    logprobs, _ = linear_logprob(leaves[0], leaves[1], targets, backend="triton")
    assert logprobs.isnan().nonzero().flatten().tolist() == [3, 9]


@pytest.mark.parametrize("pieces", ["as shipped", "one chunk"])
def test_past_two_to_the_31_elements(pieces, monkeypatch):
    """14400 tokens of a vocabulary of 151936; also with all of them in one buffer of 2.2e9 elements."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    if pieces == "one chunk":
        from grpo_kernels import _triton_head

        for name in ("CHUNK_ROWS", "LOGITS_BYTES", "STORED_BYTES"):
            monkeypatch.setattr(_triton_head, name, 1 << 36)
    count, vocabulary = 14400, 151936
    leaves, targets = problem(count, 64, vocabulary, torch.bfloat16)
    by = torch.linspace(-1.0, 2.0, count, device=DEVICE)
    ours = outputs(linear_logprob, leaves, targets, (by, None), {"backend": "triton"})
    d_weight = torch.zeros_like(ours["d_weight"])
    for start in range(0, count, 1440):
        rows = slice(start, start + 1440)
        part = [leaves[0][rows].double(), leaves[1].double()]
        truth = outputs(reference.linear_logprob, part, targets[rows], (by[rows], None), {})
        d_weight += truth.pop("d_weight")
        for name, true in truth.items():
            assert off(ours[name][rows], true) <= (5e-3 if name == "d_hidden" else 1e-5), (name, start)
    assert off(ours["d_weight"], d_weight) <= 5e-3


def loss_arguments(count: int, logprobs: Tensor) -> dict[str, Any]:
    noise = torch.linspace(-0.4, 0.4, count, device=DEVICE)
    return {
        "old_logprobs": logprobs + noise,
        "ref_logprobs": logprobs - noise.flip(0),
        "loss_mask": torch.arange(count, device=DEVICE) % 7 != 3,
        "cu_seqlens": torch.tensor([0, count // 5, count // 2, count], dtype=torch.int32, device=DEVICE),
        "normalizer": 3.0,
    }


ADVANTAGES = [1.0, -0.7, 0.4]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "config",
    [LossConfig.preset("grpo"), LossConfig.preset("gspo"), LossConfig.preset("dapo", entropy_coef=0.02)],
    ids=["grpo", "gspo", "entropy"],
)
def test_linear_grpo_loss(config, backend, frozen):
    (hidden, weight), targets = problem(5000, 64, 30011, torch.bfloat16)
    # Constants around the exact log-probs: none of the three decides differently at a clipping edge by luck.
    exact, _ = reference.linear_logprob(hidden.double(), weight.double(), targets)
    given = loss_arguments(5000, exact)

    def run(function: Callable[..., Any], dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)]
        arguments = {
            key: value.to(torch.promote_types(dtype, torch.float32))
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in given.items()
        }
        advantages = torch.tensor(ADVANTAGES, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
        loss, _ = function(*leaves, targets, advantages, config, **arguments, **options)
        gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
        return [loss.detach().double(), *(gradient.double() for gradient in gradients)]

    truth = run(reference.linear_grpo_loss, torch.float64)
    eager = run(reference.linear_grpo_loss, torch.bfloat16)
    ours = run(linear_grpo_loss, torch.bfloat16, backend=backend)
    for index, (true, plain, found) in enumerate(zip(truth, eager, ours, strict=True)):
        assert off(found, true) <= off(plain, true) + 3e-3, f"result {index}"


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "sapo", "vespo"])
def test_grpo_loss(name):
    count = 3000
    logprobs = -torch.rand(count, device=DEVICE, dtype=torch.float64) * 4
    given = loss_arguments(count, logprobs)
    advantages = torch.tensor(ADVANTAGES, device=DEVICE, dtype=torch.float64)
    found = []
    for function, dtype in ((reference.grpo_loss, torch.float64), (grpo_loss, torch.float32)):
        leaf = logprobs.to(dtype).requires_grad_()
        arguments: dict[str, Any] = {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in given.items()
        }
        loss, _ = function(leaf, advantages.to(dtype), LossConfig.preset(name), **arguments)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append((loss.detach().double(), gradient.double()))
    for true, ours in zip(*found, strict=True):
        assert off(ours, true) <= 2e-5


@pytest.mark.parametrize("mode", ["scalarized", "per_head", "gdpo", "dvao", "leave_one_out"])
def test_group_advantages(mode):
    rewards = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    rewards[5, 1] = torch.nan
    true = reference.group_advantages(rewards, group_size=8, mode=mode)
    found = group_advantages(rewards.to(DEVICE), group_size=8, mode=mode)
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_nothing_waits_for_the_device(name):
    (hidden, weight), targets = problem(512, 64, 5003, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    given = loss_arguments(512, linear_logprob(hidden.detach(), weight.detach(), targets)[0])
    advantages = torch.tensor(ADVANTAGES, device=DEVICE)
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = linear_grpo_loss(
                hidden, weight, targets, advantages, LossConfig.preset(name), backend="triton", **given
            )
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_scratch_does_not_grow_with_the_tokens():
    width, vocabulary = 64, 151936
    extra = []
    for count in (8192, 32768):
        (hidden, weight), targets = problem(count, width, vocabulary, torch.bfloat16)
        hidden.requires_grad_()
        weight.requires_grad_()
        advantages = torch.ones(count, device=DEVICE)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = linear_grpo_loss(
            hidden, weight, targets, advantages, LossConfig.preset("dapo"), backend="triton"
        )
        extra.append(torch.cuda.max_memory_allocated() - before)
        del loss
    # E′ of a chunk, logits of a part, dW in float32 and its copy, and what is small
    assert max(extra) <= (1280 << 20) + (384 << 20) + 6 * vocabulary * width + (128 << 20)
    assert extra[1] - extra[0] <= 24_576 * (width * 2 + 400)
