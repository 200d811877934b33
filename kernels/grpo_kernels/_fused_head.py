"""The loss head on a GPU without float32 logits: one Triton product gives log-probs and E′ at once.

Log-probs alone need no scratch but two partial sums for each row and column tile. With gradients, E′ of one
chunk in the dtype of the head is all the scratch, and the products behind it are those of the triton backend.
float16 cannot hold the exponentials: once the sums are known, a second product stores E′/(1 + s).

On CPU tensors the same code runs under Triton's interpreter.
N tokens, n of a chunk, H hidden size, V vocabulary, P columns of the padded rows, C column tiles of V.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._fused_kernels import MAXIMA, finish_rows, fused_rows, raise_references, reference_rows, tile_for
from ._head import Coefficients, Head, HeadOutput, Needs, run_chunks
from ._row_kernels import NO_STORE, STORE_EXPONENTIALS, STORE_PROBABILITIES
from ._triton_head import _Chunk, _sizes, _TritonSteps

FORWARD_ROWS = 16384  # of a chunk whose E′ nobody needs
BIAS_ROWS = 128  # of E′ in float32 at once, for the bias's gradient
FINISH = {"BLOCK_ROWS": 32, "BLOCK_TILES": 64}  # of partial sums
REFERENCE_BLOCK = 512  # of H


def fused_head(head: Head, needs: Needs, coefficients: Coefficients | None) -> HeadOutput:
    """Log-probs and entropies, and the gradients asked for, in one pass over token chunks."""
    return run_chunks(head, needs, coefficients, _FusedSteps(head, needs))


class _FusedSteps(_TritonSteps):
    """The triton backend's steps behind another forward."""

    backend = "fused"

    def __init__(self, head: Head, needs: Needs) -> None:
        """Raises ValueError for tensors off the GPU, unless Triton interprets its kernels."""
        super().__init__(head, needs)
        device, vocabulary = head.hidden.device, head.weight.shape[0]
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        describable = _describable(head.hidden) and _describable(head.weight)
        self.tile = tile_for(major, head.hidden.dtype, describable=describable)
        self.column_tiles = -(-vocabulary // self.tile.columns)
        # sums of exponentials, and of exponential times exponent
        self.partial = torch.empty(2, self.column_tiles * self.rows, dtype=torch.float32, device=device)
        self.own = torch.empty(2, self.rows, dtype=torch.float32, device=device)  # logits, slopes
        self.places = torch.empty(self.rows, dtype=torch.int32, device=device)
        self.overflow = torch.empty(1, dtype=torch.int32, device=device)
        self.programs = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        )

    def sizes(self, count: int) -> tuple[int, int]:
        """Rows of E′ made float32 at once for the bias's gradient, and rows of a chunk."""
        if not self.needs:
            return 0, max(1, min(count, FORWARD_ROWS))
        rows = _sizes(count, self.padded, self.head.hidden.dtype.itemsize, True)[1]
        return min(BIAS_ROWS, rows) if self.needs.bias else 0, rows

    def forward(self, rows: slice) -> _Chunk:
        """Log-probs and entropies of a chunk, and its E or E′ in the scratch where gradients are needed."""
        head, n = self.head, rows.stop - rows.start
        hidden = head.hidden[rows]
        capped = head.softcap is not None
        reference_rows[(n,)](
            hidden,
            head.weight,
            self.bias,
            self.targets[rows],
            self.places,
            *self.own,
            self.sums[4],
            self.overflow,
            head.weight.shape[1],
            head.weight.shape[0],
            *hidden.stride(),
            *head.weight.stride(),
            head.scale,
            head.softcap if capped else 1.0,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=capped,
            BLOCK=REFERENCE_BLOCK,
        )
        store = NO_STORE if self.probabilities or not self.needs else STORE_EXPONENTIALS
        self._multiply(hidden, store)
        self._finish(n, store)
        self._multiply(hidden, MAXIMA, redo=True)
        raise_references[(-(-n // FINISH["BLOCK_ROWS"]),)](
            self.partial[0], self.sums[4], self.sums[3], self.overflow, n, self.column_tiles, **FINISH
        )
        self._multiply(hidden, store, redo=True)
        self._finish(n, store, redo=True)
        if self.probabilities and self.needs:
            self._multiply(hidden, STORE_PROBABILITIES)
            self._finish(n, STORE_PROBABILITIES)
        return _Chunk(rows, *self.sums[:2, :n])

    def _multiply(self, hidden: Tensor, mode: tl.constexpr, *, redo: bool = False) -> None:
        """One product over the chunk's hidden states (n, H), of all rows or of those to be done again."""
        head, tile = self.head, self.tile
        capped = head.softcap is not None
        left, right = hidden, head.weight
        if tile.descriptors:
            left = TensorDescriptor.from_tensor(left, [tile.rows, tile.depth])
            right = TensorDescriptor.from_tensor(right, [tile.columns, tile.depth])
        tiles = -(-len(hidden) // tile.rows) * self.column_tiles
        fused_rows[(min(self.programs, tiles),)](
            left,
            right,
            self.bias,
            self.places,
            self.sums[4],
            self.sums[2],
            self.sums[3],
            self.overflow,
            *self.partial,
            self.stored,
            *hidden.shape,
            head.weight.shape[0],
            self.padded,
            *hidden.stride(),
            *head.weight.stride(),
            head.scale,
            head.softcap if capped else 1.0,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=capped,
            MODE=mode,
            SLOPED=capped and not self.needs.entropy,
            REDO=redo,
            DESCRIPTORS=tile.descriptors,
            PRECISION="tf32x3" if hidden.dtype == torch.float32 else "tf32",
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            BLOCK_DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def _finish(self, n: int, store: tl.constexpr, *, redo: bool = False) -> None:
        finish_rows[(-(-n // FINISH["BLOCK_ROWS"]),)](
            *self.partial,
            self.stored,
            self.places,
            *self.own,
            *self.sums,
            self.overflow,
            n,
            self.column_tiles,
            self.padded,
            STORE=store,
            SLOPED=self.head.softcap is not None and not self.needs.entropy,
            REDO=redo,
            **FINISH,
        )


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can address it: rows of whole 16 bytes, at such addresses."""
    size = matrix.element_size()
    return (
        matrix.numel() > 0
        and matrix.stride(1) == 1
        and matrix.stride(0) * size % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )
