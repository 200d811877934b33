"""What the tests of the kernels share: heads to compute, losses to compare, and how far off is too far.

N tokens, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import grpo_kernels._torch_head as torch_head
import pytest
import torch
from torch import Tensor

N, H, V = 37, 16, 301  # ragged against every block and chunk below


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
