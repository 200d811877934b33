"""The loss head on a GPU: cuBLAS products with float32 output, Triton row kernels between them.

A chunk of tokens is what enters the two gradient products at once, long enough for the float32 addition to dW
to be cheap. Its float32 logits exist a part at a time: the row kernel turns the part's logits into E′ in the
dtype of the head, half the bytes, and the next part overwrites them. So scratch is one chunk of E′ and one
part of logits, whatever N is.

float16 cannot hold the exponentials: E′/(1 + s) is stored instead, by a second read in the same kernel. The
entropy's gradient needs the whole row before its first column: a second kernel makes it out of E in place.

On CPU tensors the same code runs under Triton's interpreter, with float32 products.
N tokens, n of a chunk, H hidden size, V vocabulary, P columns of the padded rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._head import Coefficients, Head, HeadOutput, Needs, run_chunks
from ._row_kernels import (
    NO_STORE,
    STORE_EXPONENTIALS,
    STORE_PROBABILITIES,
    entropy_rows,
    launch_for,
    softmax_rows,
)

CHUNK_ROWS = 4096
STORED_BYTES = 1280 << 20  # E′ of one chunk
LOGITS_BYTES = 224 << 20  # float32 logits of one part
TILE_ROWS = 128  # parts are whole tiles of the products
ROW_ALIGNMENT = 64  # elements: rows of every buffer start where products and wide loads want them


def triton_head(head: Head, needs: Needs, coefficients: Coefficients | None) -> HeadOutput:
    """Log-probs and entropies, and the gradients asked for, in one pass over token chunks."""
    return run_chunks(head, needs, coefficients, _TritonSteps(head, needs))


@dataclass(frozen=True)
class _Chunk:
    """One chunk after its forward pass; everything else of it lies in the scratch."""

    rows: slice
    logprobs: Tensor  # (n,) float32
    entropy: Tensor  # (n,) float32


class _TritonSteps:
    """Scratch of one call and what is done to each chunk."""

    backend = "triton"

    def __init__(self, head: Head, needs: Needs) -> None:
        """Raises ValueError for tensors off the GPU, unless Triton interprets its kernels."""
        device = head.hidden.device
        if device.type != "cuda" and not _interpreted():
            raise ValueError(
                f"backend {self.backend!r} needs CUDA tensors, got {device.type}; "
                "set TRITON_INTERPRET=1 before the first import of triton to run it in the interpreter"
            )
        self.head, self.needs = head, needs
        count, vocabulary = head.hidden.shape[0], head.weight.shape[0]
        self.padded = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
        self.part, self.rows = self.sizes(count)
        self.probabilities = head.hidden.dtype == torch.float16
        # One chunk is all of dW: the product rounds it to the head's dtype itself, and no float32 dW exists.
        whole = count <= self.rows and device.type == "cuda" and not self.probabilities
        self.gradient_dtype = head.weight.dtype if whole else torch.float32
        real: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.logits = torch.empty(self.part, self.padded, **real)
        self.stored = torch.empty(
            self.rows if needs else 0, self.padded, dtype=head.hidden.dtype, device=device
        )
        self.sums = torch.empty(5, self.rows, **real)  # logprobs, entropies, wholes, others, references
        self.targets = head.targets.contiguous()
        self.bias = self.logits if head.bias is None else head.bias.detach().contiguous()
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        launch = launch_for(major, head.hidden.dtype, vocabulary)
        self.launch = {"BLOCK": launch.block, "num_warps": launch.warps}

    def sizes(self, count: int) -> tuple[int, int]:
        """Rows of a part, whose logits exist at once, and of a chunk."""
        return _sizes(count, self.padded, self.head.hidden.dtype.itemsize, bool(self.needs))

    def forward(self, rows: slice) -> _Chunk:
        """Log-probs and entropies of a chunk, and its E or E′ in the scratch where gradients are needed."""
        head, capped = self.head, self.head.softcap is not None
        store = NO_STORE
        if self.needs:
            store = STORE_PROBABILITIES if self.probabilities else STORE_EXPONENTIALS
        for start in range(rows.start, rows.stop, self.part):
            span = slice(start, min(start + self.part, rows.stop))
            length, offset = span.stop - span.start, span.start - rows.start
            logits = self.logits[:length, : head.weight.shape[0]]
            _product(head.hidden[span], head.weight.t(), logits)
            softmax_rows[(length,)](
                self.logits,
                self.stored[offset:] if self.needs else self.logits,
                self.bias,
                self.targets[span],
                *self.sums[:, offset:],
                self.padded,
                head.weight.shape[0],
                head.scale,
                head.softcap if capped else 1.0,
                HAS_BIAS=head.bias is not None,
                HAS_SOFTCAP=capped,
                STORE=store,
                SLOPED=capped and not self.needs.entropy,
                **self.launch,
            )
        logprobs, entropy = self.sums[:2, : rows.stop - rows.start]
        return _Chunk(rows, logprobs, entropy)

    def finish(self, chunk: _Chunk, by_logprob: Tensor, by_entropy: Tensor | None) -> Tensor:
        """Makes the scratch the loss's derivative by the raw products, up to the factor returned: (n,)."""
        head, n = self.head, len(chunk.logprobs)
        logprobs, entropies, wholes, others, references = self.sums[:, :n]
        by_logprob = by_logprob.float().expand(n)
        if by_entropy is not None:
            # only the ratio of the two goes through the low-precision store
            size = torch.maximum(by_logprob.abs(), by_entropy.abs())
            divisor = torch.where(size == 0.0, 1.0, size)
            entropy_rows[(n,)](
                self.stored,
                self.targets[chunk.rows],
                logprobs,
                entropies,
                wholes,
                others,
                references,
                (by_logprob / divisor).contiguous(),
                (by_entropy.float() / divisor).contiguous(),
                self.padded,
                head.weight.shape[0],
                head.scale,
                1.0 if head.softcap is None else head.softcap,
                HAS_SOFTCAP=head.softcap is not None,
                PROBABILITIES=self.probabilities,
                **self.launch,
            )
            by_logprob = size
        factor = -head.scale * by_logprob
        return factor if self.probabilities else factor / wholes

    def grad_hidden(self, chunk: _Chunk, row_factor: Tensor) -> Tensor:
        """dX of the chunk, (n, H) float32."""
        head, stored = self.head, self._stored(chunk)
        product = torch.empty(len(stored), head.weight.shape[1], dtype=torch.float32, device=stored.device)
        return _product(stored, head.weight, product).mul_(row_factor.unsqueeze(1))

    def add_grad_weight(
        self,
        chunk: _Chunk,
        row_factor: Tensor,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        beta: float,
    ) -> None:
        """Adds the chunk's share to beta times dW (V, H) and db (V,)."""
        stored = self._stored(chunk)
        if d_weight is not None:
            _add_product(stored.t(), self.head.hidden[chunk.rows], row_factor, d_weight, beta)
        if d_bias is not None:
            for start in range(0, len(stored), self.part):  # the logits' scratch is free by now
                block = stored[start : start + self.part]
                floats = self.logits[: len(block), : block.shape[1]].copy_(block)
                d_bias.addmv_(
                    floats.t(), row_factor[start : start + self.part], beta=beta if start == 0 else 1.0
                )

    def _stored(self, chunk: _Chunk) -> Tensor:
        return self.stored[: len(chunk.logprobs), : self.head.weight.shape[0]]


def _sizes(count: int, padded: int, itemsize: int, keeps: bool) -> tuple[int, int]:
    """Rows of a part and of a chunk: whole tiles where the bytes allow, parts of about equal size."""

    def tiles(rows: int) -> int:
        return max(1, rows if rows < TILE_ROWS else rows // TILE_ROWS * TILE_ROWS)

    most = tiles(LOGITS_BYTES // (4 * padded))
    chunk = min(count, CHUNK_ROWS, tiles(STORED_BYTES // (itemsize * padded)) if keeps else most)
    part = -(-chunk // -(-chunk // most)) if chunk else 1
    return max(1, min(most, -(-part // TILE_ROWS) * TILE_ROWS, chunk)), max(1, chunk)


def _interpreted() -> bool:
    """Whether Triton took the kernels for its interpreter, which it decides at their definition."""
    return type(softmax_rows).__name__ == "InterpretedFunction"


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into out, float32 (the interpreter's CPU tensors: float32 operands)."""
    if left.dtype == torch.float32 or not left.is_cuda:
        return torch.mm(left.float(), right.float(), out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add_product(left: Tensor, rows: Tensor, factor: Tensor, out: Tensor, beta: float) -> None:
    """out = beta · out + left @ (factor ⊙ rows), summed in float32; out of another dtype needs beta 0."""
    unit = None
    if rows.dtype == torch.float16:
        # A small normalizer must not underflow float16: the largest factor goes round the product.
        unit = factor.abs().amax().clamp(min=1e-20)
        factor = factor / unit
        if beta != 0.0:
            out.mul_(beta / unit)
            beta = 1.0
    scaled = (rows * factor.unsqueeze(1)).to(rows.dtype)
    if not rows.is_cuda or rows.dtype == torch.float32:
        torch.addmm(out, left.float(), scaled.float(), beta=beta, out=out)
    elif out.dtype == rows.dtype:
        torch.mm(left, scaled, out=out)
    elif beta == 0.0:
        torch.mm(left, scaled, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, left, scaled, out_dtype=torch.float32, beta=beta, out=out)
    if unit is not None:
        out.mul_(unit)
