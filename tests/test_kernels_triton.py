"""The triton backend in Triton's interpreter, against the float64 reference.

Tiny shapes, since the interpreter runs every program in Python. Blocks, parts and chunks are made smaller
still, so that every loop runs more than once and every tail is ragged; uninitialised memory holds NaN.
"""
# pyright: reportCallIssue=false, reportArgumentType=false
# (unpacked leaves and options: the checker cannot count or tell them apart)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig, linear_grpo_loss, linear_logprob, reference
from kernel_cases import (
    DTYPES,
    OPTIONS,
    TOLERANCE,
    assert_no_tokens_give_no_gradient,
    assert_strided_is_the_same,
    compare,
    hard_rows,
    problem,
)
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from grpo_kernels import _triton_head
from grpo_kernels._row_kernels import Launch


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Blocks of 128 columns, chunks of 8 tokens in parts of at most 4; NaN in uninitialised memory."""
    monkeypatch.setattr(_triton_head, "launch_for", lambda *_: Launch(128, 4))
    monkeypatch.setattr(_triton_head, "CHUNK_ROWS", 8)
    monkeypatch.setattr(_triton_head, "TILE_ROWS", 4)
    monkeypatch.setattr(_triton_head, "LOGITS_BYTES", 4 * 704 * 4)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1), (3, 2), (8, 128), (9, 129), (17, 700)])
def test_ragged_shapes(count, vocabulary, dtype):
    hidden, weight, targets = problem(count, vocabulary, dtype)
    compare([hidden, weight], targets, {}, entropy_gradient=False, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, entropy_gradient, dtype):
    hidden, weight, targets = problem(10, 197, dtype)
    inputs = [hidden, weight]
    if "bias" in options:
        bias = torch.linspace(-2.0, 2.0, 197).to(dtype)
        bias[5] = bias[190] = -torch.inf
        targets[targets == 5] = 6
        inputs.append(bias)
    options = {name: value for name, value in options.items() if name != "bias"}
    if "softcap" in options and len(inputs) > 2:  # the reference's tanh has no derivative at -inf
        inputs[2].clamp_(min=-100.0)
    compare(inputs, targets, options, entropy_gradient=entropy_gradient, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_adversarial_rows(entropy_gradient, dtype):
    logits, targets = hard_rows()
    weight = torch.eye(150)
    compare(
        [logits.to(dtype), weight.to(dtype)],
        targets,
        {},
        entropy_gradient=entropy_gradient,
        tolerance=TOLERANCE[dtype],
    )


def test_nearly_certain_target_keeps_relative_precision():
    hidden = torch.tensor([[12.0, 0.0, 0.0], [30.0, 0.0, 0.0], [60.0, 0.0, 0.0]])
    logprobs, entropy = linear_logprob(
        hidden, torch.eye(3), torch.zeros(3, dtype=torch.long), backend="triton"
    )
    true_logprobs, true_entropy = reference.linear_logprob(
        hidden.double(), torch.eye(3).double(), torch.zeros(3, dtype=torch.long)
    )
    rest = 2 * torch.exp(-hidden[:, 0].double())
    torch.testing.assert_close(logprobs.double(), -rest.log1p(), rtol=1e-6, atol=0)
    assert true_logprobs.shape == logprobs.shape
    torch.testing.assert_close(entropy.double(), true_entropy, rtol=1e-4, atol=1e-12)


def test_strided_inputs_and_int32_targets():
    assert_strided_is_the_same("triton")


LOSSES = {
    "grpo": (LossConfig.preset("grpo"), 1e-5),
    "coupled": (LossConfig.preset("gspo", clip_low=0.2, clip_high=0.2), 1e-5),
    "entropy": (LossConfig.preset("dapo", entropy_coef=0.05), 1e-5),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_grpo_loss_and_gradients(name, frozen):
    config, tolerance = LOSSES[name]
    hidden, weight, targets = problem(13, 260, torch.float32)
    generator = torch.Generator().manual_seed(1)
    constants: dict[str, Any] = {
        "old_logprobs": linear_logprob(hidden, weight, targets)[0]
        + 0.2 * torch.randn(13, generator=generator),
        "ref_logprobs": linear_logprob(hidden, weight, targets)[0]
        + 0.2 * torch.randn(13, generator=generator),
        "cu_seqlens": torch.tensor([0, 4, 5, 13], dtype=torch.int32),
        "loss_mask": torch.arange(13) != 6,
    }
    advantages = torch.tensor([1.0, -0.5, 0.3])

    def run(function: Callable[..., Any], dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], dict]:
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)]
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in constants.items()}
        loss, metrics = function(*leaves, targets, advantages.to(dtype), config, **given, **options)
        gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
        return [loss.detach(), *gradients], metrics

    ours, metrics = run(linear_grpo_loss, torch.float32, backend="triton")
    truth, _ = run(reference.linear_grpo_loss, torch.float64)
    _, plain_metrics = run(linear_grpo_loss, torch.float32, backend="torch")
    for value, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(
            value.double(), true, rtol=0, atol=tolerance * (true.abs().max().item() + 1e-3)
        )
    for key, value in plain_metrics.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-4, atol=1e-5)


def test_no_tokens():
    assert_no_tokens_give_no_gradient("triton")


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    hidden, weight, targets = problem(3, 5, torch.float32)
    monkeypatch.setattr(_triton_head, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got cpu.*TRITON_INTERPRET"):
        linear_logprob(hidden, weight, targets, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        linear_logprob(hidden.double(), weight.double(), targets, backend="triton")


@pytest.mark.parametrize("vocabulary", [512, 32064, 131072, 152064, 262144])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_scratch_is_bounded_whatever_n_is(vocabulary, itemsize, monkeypatch):
    monkeypatch.undo()
    sizes = {
        _triton_head._sizes(count, vocabulary, itemsize, True) for count in (10_000, 100_000, 10_000_000)
    }
    assert len(sizes) == 1
    ((part, chunk),) = sizes
    assert part * vocabulary * 4 + chunk * vocabulary * itemsize <= 3 << 29  # 1.5 GiB
    assert part % 128 == 0 and 0 < part <= chunk <= 4096
    if itemsize == 2 and vocabulary <= 152064:
        assert chunk == 4096  # what makes the float32 addition to dW cheap
