"""The output head as the kernels see it: arguments checked, backend chosen, scratch sized.

N tokens, H hidden size, V vocabulary.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ._arguments import check_name, check_number, check_tensors, may_read

Backend = Literal["auto", "torch", "triton", "fused"]
BACKENDS = ("auto", "torch", "triton", "fused")
ELEMENTWISE_BACKENDS = ("auto", "torch", "triton")  # of the operations without a product
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger("grpo_kernels")
_announced: set[tuple[str, str]] = set()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs (gradient checks)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Head:
    """z = logit_scale · cap(hidden weightᵀ + bias), where cap(x) = softcap · tanh(x / softcap) or x."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,) int64
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None
    logit_scale: float

    @property
    def accumulate(self) -> torch.dtype:
        """Dtype of logits, sums and results."""
        return accumulation_dtype(self.hidden.dtype)

    @property
    def scale(self) -> float:
        """Factor from capped logits to exponents."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class Needs:
    """Which gradients to compute."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    entropy: bool = False  # the coefficients carry a derivative by the entropy

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


# Takes the rows of a chunk, their log-probs and entropies; returns the loss's derivatives by both.
Coefficients = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class HeadOutput:
    """What one pass over the head gives; gradients are those asked for."""

    logprobs: Tensor  # (N,) accumulation dtype
    entropy: Tensor  # (N,) accumulation dtype
    hidden: Tensor | None  # (N, H) dtype of hidden
    weight: Tensor | None  # (V, H) dtype of weight
    bias: Tensor | None  # (V,) dtype of bias


class ChunkResult(Protocol):
    """What every backend's forward over a chunk tells of it."""

    @property
    def logprobs(self) -> Tensor: ...  # (n,) accumulation dtype
    @property
    def entropy(self) -> Tensor: ...  # (n,) accumulation dtype


Chunk = TypeVar("Chunk", bound=ChunkResult)


class Steps(Protocol[Chunk]):
    """A backend: scratch of one call, and what it does to each chunk of tokens in turn."""

    rows: int  # tokens of a chunk
    gradient_dtype: torch.dtype  # what dW is added up in

    def forward(self, rows: slice) -> Chunk:
        """Log-probs and entropies of these tokens; keeps what their gradients need."""
        ...

    def finish(self, chunk: Chunk, by_logprob: Tensor, by_entropy: Tensor | None) -> Tensor:
        """Takes the loss's derivatives, (n,) or broadcast to it; returns a factor of each gradient row."""
        ...

    def grad_hidden(self, chunk: Chunk, row_factor: Tensor) -> Tensor:
        """dX of the chunk, (n, H)."""
        ...

    def add_grad_weight(
        self, chunk: Chunk, row_factor: Tensor, d_weight: Tensor | None, d_bias: Tensor | None, beta: float
    ) -> None:
        """Adds the chunk's share to beta times dW (V, H) and db (V,); beta is 0 or 1."""
        ...


def head_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[float, float | None, float]]:
    """hidden, weight, bias and the three numbers as the operators take them, checked.

    Under autocast the operands come in its dtype, as for a linear layer; results stay float32.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = _cast(hidden, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    _check_head(hidden, weight, targets, bias, temperature, softcap, logit_scale)
    check_backend(backend)
    options = (float(temperature), None if softcap is None else float(softcap), float(logit_scale))
    return hidden, weight, bias, options


def _cast(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast would: what is no real number is left as it is, to be refused."""
    return operand.to(dtype) if operand.is_floating_point() else operand


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Shapes, dtypes, devices and ranges: all that needs no tensor's values. Raises ValueError, TypeError."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden must have shape (N, H), got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"weight must have shape (V, H) = (V, {hidden.shape[1]}), got {tuple(weight.shape)}")
    count, vocabulary = hidden.shape[0], weight.shape[0]
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"hidden must be float64, float32, bfloat16 or float16, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    if targets.shape != (count,):
        raise ValueError(f"targets must have shape (N,) = ({count},), got {tuple(targets.shape)}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias must have shape (V,) = ({vocabulary},), got {tuple(bias.shape)}")
    if bias is not None and bias.dtype not in _DTYPES:
        raise TypeError(f"bias must be float64, float32, bfloat16 or float16, got {bias.dtype}")
    check_tensors("hidden", hidden.device, weight=weight, targets=targets, bias=bias)
    check_number("temperature", temperature)
    check_number("logit_scale", logit_scale)
    if softcap is not None:
        check_number("softcap", softcap)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite or None, got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")


def make_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> Head:
    """The checked head. Targets out of range raise on the CPU and, with ``GRPO_KERNELS_DEBUG=1``, everywhere.

    Elsewhere looking for them would stop the host: their log-probs are NaN.
    """
    vocabulary = weight.shape[0]
    if targets.numel() and may_read(targets):
        low, high = int(targets.min()), int(targets.max())
        if not 0 <= low <= high < vocabulary:
            worst = low if low < 0 else high
            raise ValueError(f"targets must lie in [0, V) = [0, {vocabulary}), got {worst}")
    return Head(hidden, weight, targets.long(), bias, float(temperature), softcap, float(logit_scale))


def check_backend(backend: str, known: Sequence[str] = BACKENDS) -> None:
    """ValueError for a name that is none of the known, with the nearest."""
    check_name("backend", backend, known)


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolves ``auto``: triton on CUDA if installed, else torch; torch for float64. Logs each choice once.

    ``auto`` never takes fused, which is unmeasured.

    Raises:
        ValueError: a backend that cannot run on this device or dtype.
    """
    if backend != "auto":
        if backend in ("triton", "fused") and dtype == torch.float64:
            raise ValueError(f"backend {backend!r} does not take float64; use backend='torch'")
        return backend
    able = device.type == "cuda" and dtype != torch.float64 and find_spec("triton") is not None
    chosen = "triton" if able else "torch"
    if (device.type, chosen) not in _announced:
        _announced.add((device.type, chosen))
        _log.info("kernels on %s: backend %s", device.type, chosen)
    return chosen


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one: Triton launches its kernels there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def chunk_rows(count: int, bytes_per_row: int, budget: int) -> int:
    """Rows per chunk: as few chunks as the byte budget allows, of equal size."""
    most = max(1, budget // max(1, bytes_per_row))
    return max(1, math.ceil(count / max(1, math.ceil(count / most))))


def run_chunks(
    head: Head, needs: Needs, coefficients: Coefficients | None, steps: Steps[Chunk]
) -> HeadOutput:
    """Log-probs and entropies, and the gradients asked for, chunk by chunk."""
    count, width = head.hidden.shape
    vocabulary = head.weight.shape[0]
    device = head.hidden.device
    logprobs = torch.empty(count, dtype=head.accumulate, device=device)
    entropy = torch.empty_like(logprobs)
    d_hidden = torch.empty(count, width, dtype=head.hidden.dtype, device=device) if needs.hidden else None
    allocate = torch.empty if count else torch.zeros  # the first chunk overwrites
    d_weight = d_bias = None
    if needs.weight:
        d_weight = allocate(vocabulary, width, dtype=steps.gradient_dtype, device=device)
    if needs.bias:
        d_bias = allocate(vocabulary, dtype=head.accumulate, device=device)
    for start in range(0, count, steps.rows):
        rows = slice(start, min(start + steps.rows, count))
        chunk = steps.forward(rows)
        logprobs[rows], entropy[rows] = chunk.logprobs, chunk.entropy
        if coefficients is not None:
            by_logprob, by_entropy = coefficients(rows, chunk.logprobs, chunk.entropy)
            row_factor = steps.finish(chunk, by_logprob, by_entropy)
            if d_hidden is not None:
                d_hidden[rows] = steps.grad_hidden(chunk, row_factor)
            if d_weight is not None or d_bias is not None:
                beta = 0.0 if start == 0 else 1.0
                steps.add_grad_weight(chunk, row_factor, d_weight, d_bias, beta)
    return HeadOutput(
        logprobs,
        entropy,
        d_hidden,
        None if d_weight is None else d_weight.to(head.weight.dtype),
        None if d_bias is None or head.bias is None else d_bias.to(head.bias.dtype),
    )
