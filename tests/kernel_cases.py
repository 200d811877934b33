"""What the tests of the kernels share: heads to compute, losses to compare, and how far off is too far.

N tokens, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import grpo_kernels._torch_head as torch_head
import pytest
import torch
from grpo_kernels import linear_logprob, reference
from torch import Tensor

N, H, V = 37, 16, 301  # ragged against every block and chunk below

# What the backends of Triton are held to, and with which shapes of logits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}  # of the largest value
DTYPES = list(TOLERANCE)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "everything": {"temperature": 1.3, "bias": True, "softcap": 3.0, "logit_scale": 0.6},
}


def tensors(
    n: int = N,
    h: int = H,
    v: int = V,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    bias: bool = False,
    spread: float = 1.0,
) -> tuple[Any, Tensor]:
    """Leaves [hidden, weight(, bias)], and targets that hold the vocabulary's first and last token."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=random, dtype=torch.float64)
    weight = torch.randn(v, h, generator=random, dtype=torch.float64) * spread
    leaves = [hidden, weight]
    if bias:
        leaves.append(torch.randn(v, generator=random, dtype=torch.float64))
    targets = torch.randint(0, v, (n,), generator=random)
    if n > 2:
        targets[:3] = torch.tensor([0, v - 1, v // 2])
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], targets


def exact(leaves: Any) -> Any:
    """The same numbers in float64."""
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def named(leaves: Any) -> dict[str, Any]:
    return {"bias": leaves[2]} if len(leaves) > 2 else {}


def error(found: Tensor, true: Tensor) -> float:
    """Largest deviation relative to the largest true value."""
    found, true = found.detach(), true.detach().double()
    assert found.shape == true.shape
    assert not found.isnan().any()
    return (
        float((found.double() - true).abs().max() / true.abs().max().clamp(min=1e-300))
        if true.numel()
        else 0.0
    )


def assert_close(found: Any, true: Any, tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(found, true, strict=True)):
        assert error(a, b) <= tolerance, f"result {index}: error {error(a, b):.2e} > {tolerance:.0e}"


@contextlib.contextmanager
def small_chunks(backend: str, rows: int = 16, v: int = V) -> Iterator[None]:
    """Budgets so small that N tokens take several chunks and V several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "triton":
            import grpo_kernels._triton_head as triton_head

            stride = -(-v // triton_head.ROW_ALIGNMENT) * triton_head.ROW_ALIGNMENT
            patch.setattr(triton_head, "STORED_BYTES", rows * stride * 4)
            patch.setattr(triton_head, "LOGITS_BYTES", (rows // 2) * stride * 4)
        else:
            patch.setattr(torch_head, "SCRATCH_BYTES", rows * v * 8)
            patch.setattr(torch_head, "MOST_ROWS", rows)
            patch.setattr(torch_head, "BLOCK_BYTES", rows * 8 * 64)
        yield


def problem(
    count: int, vocabulary: int, dtype: torch.dtype, width: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets that hold the vocabulary's edges and that of a block of 128."""
    generator = torch.Generator().manual_seed(count * 1000 + vocabulary)
    hidden = torch.randn(count, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    targets[:1], targets[1:2], targets[2:3] = 0, vocabulary - 1, min(vocabulary - 1, 128)
    return hidden, weight, targets


def outputs(
    function: Callable[..., Any],
    inputs: list[Tensor],
    targets: Tensor,
    options: dict[str, Any],
    by: list[Tensor],
) -> list[Tensor]:
    """Log-probs, entropies and the gradients by hidden, weight (and bias) of their sum weighted with `by`."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    options = options | ({"bias": leaves[2]} if len(leaves) > 2 else {})
    found = function(leaves[0], leaves[1], targets, **options)
    total = torch.stack([(value * factor).sum() for value, factor in zip(found, by, strict=False)]).sum()
    return [value.detach() for value in (*found, *torch.autograd.grad(total, leaves))]


def compare(
    inputs: list[Tensor],
    targets: Tensor,
    options: dict[str, Any],
    *,
    entropy_gradient: bool,
    tolerance: float,
    backend: str = "triton",
) -> None:
    """Log-probs, entropies and gradients of a backend against the float64 reference, by the largest value."""
    count = len(targets)
    by = [torch.linspace(-1.0, 2.0, count)]
    if entropy_gradient:
        by.append(torch.linspace(1.5, -0.5, count))
    ours = outputs(linear_logprob, inputs, targets, options | {"backend": backend}, by)
    truth = outputs(reference.linear_logprob, [tensor.double() for tensor in inputs], targets, options, by)
    names = ["logprobs", "entropy", "d_hidden", "d_weight", "d_bias"]
    for name, value, true in zip(names, ours, truth, strict=False):
        scale = true.abs().max().item()
        limit = min(tolerance, 1e-5) if name in names[:2] else tolerance
        torch.testing.assert_close(
            value.double(),
            true,
            rtol=0,
            atol=limit * (scale + 1e-3),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def hard_rows() -> tuple[Tensor, Tensor]:
    """Logits (8, 150) and targets: what a maximum from 0, an unmasked tail or a late clamp gets wrong."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 150, generator=generator)
    logits[0] = 1e4 * torch.where(torch.arange(150) % 2 == 0, 1.0, -1.0)  # target at -1e4
    logits[1] = 3.0  # all equal
    logits[2] = -1e4
    logits[3] = -1e4
    logits[3, 149] = -50.0  # peaked, far below zero, in the tail
    logits[4] -= 200.0
    logits[5, 0] = 90.0  # the target is hopeless, the first column certain
    logits[6, 7] = 1e4  # the target is certain
    logits[7, 7] = 38.0  # large, below the redo
    return logits, torch.tensor([1, 149, 0, 149, 30, 60, 7, 8])


def assert_strided_is_the_same(backend: str) -> None:
    """Rows and columns with gaps, a transposed weight and int32 targets with gaps give the dense result."""
    hidden, weight, targets = problem(9, 140, torch.float32)
    wide = torch.randn(18, 24)
    wide[::2, ::2] = hidden
    strided_targets = torch.zeros(18, dtype=torch.int32)
    strided_targets[::2] = targets.int()
    expected = linear_logprob(hidden, weight, targets, backend=backend)
    strided = linear_logprob(
        wide[::2, ::2], weight.t().contiguous().t(), strided_targets[::2], backend=backend
    )
    for one, other in zip(expected, strided, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def assert_no_tokens_give_no_gradient(backend: str) -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    logprobs, _ = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.long), backend=backend)
    logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
