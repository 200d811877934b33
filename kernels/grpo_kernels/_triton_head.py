"""The loss head on a GPU: cuBLAS products with float32 output, Triton row kernels between them.

Logits come out of the first product in float32, a part of a chunk at a time; the row kernel turns them into
E′ in the dtype of the head, and those of the whole chunk go into the other two products. So a chunk is long
enough for the float32 addition to dW to be cheap, and the float32 logits of a part stay small.

N tokens, n of a chunk, H hidden size, V vocabulary. On CPU tensors the same code runs under Triton's
interpreter, with float32 products.
"""

import torch
import triton
from torch import Tensor

from ._head import Coefficients, Head, HeadOutput, Needs, chunk_rows
from ._row_kernels import gradient_rows, softmax_rows

STORED_BYTES = 1280 << 20  # E′ of one chunk
LOGITS_BYTES = 192 << 20  # float32 logits of one part
ROW_ALIGNMENT = 64  # elements: rows of every buffer start where the products want them


def launch(vocabulary: int) -> dict[str, int]:
    """Block and warps of the row kernels: by the launch table, for lack of anything measured better yet."""
    block = min(4096, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}


def triton_head(head: Head, needs: Needs, coefficients: Coefficients | None) -> HeadOutput:
    """Log-probs and entropies, and the gradients asked for, in one pass over token chunks."""
    hidden, weight = head.hidden, head.weight
    count, width = hidden.shape
    vocabulary = weight.shape[0]
    stride = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
    real = {"dtype": torch.float32, "device": hidden.device}
    rows = torch.empty(6, count, **real)  # log-probs, entropies, and the four sums behind them
    d_hidden = torch.empty(count, width, dtype=hidden.dtype, device=hidden.device) if needs.hidden else None
    allocate = torch.empty if count else torch.zeros  # the first chunk overwrites
    d_weight = allocate(vocabulary, width, **real) if needs.weight else None
    d_bias = allocate(vocabulary, **real) if needs.bias else None

    # float16 holds probabilities but not exponentials, and the entropy's gradient needs the row's end: both read
    # the logits twice, so their chunks are parts. So are those of a frozen head, where nothing is accumulated.
    twice = bool(needs) and (needs.entropy or hidden.dtype == torch.float16)
    part = chunk_rows(count, 4 * stride, LOGITS_BYTES)
    chunk = part
    if (needs.weight or needs.bias) and not twice:
        chunk = max(part, STORED_BYTES // (hidden.dtype.itemsize * stride) // part * part)
    chunk = min(chunk, max(count, 1))
    logits = torch.empty(min(part, chunk), stride, **real)[:, :vocabulary]
    stored = torch.empty(chunk if needs else 0, stride, dtype=hidden.dtype, device=hidden.device)[
        :, :vocabulary
    ]
    kernel_options = {
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
    } | launch(vocabulary)
    bias = logits if head.bias is None else head.bias
    shape = (stride, stride, vocabulary, head.scale, head.softcap or 1.0)

    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        here = slice(start, stop)
        for first in range(start, stop, part):
            span = slice(first, min(first + part, stop))
            length = span.stop - span.start
            _product(hidden[span], weight.t(), logits[:length])
            softmax_rows[(length,)](
                logits,
                stored[first - start :] if needs else logits,
                bias,
                head.targets[span],
                *rows[:, span],
                *shape,
                STORE=bool(needs) and not twice,
                **kernel_options,
            )
        if coefficients is None or not needs:
            continue
        by_logprob, by_entropy = coefficients(here, rows[0, here], rows[1, here])
        by_logprob = by_logprob.float().expand(stop - start)
        if twice:
            by_entropy = torch.zeros_like(by_logprob) if by_entropy is None else by_entropy.float()
            # only the ratio of the two goes through the low-precision store
            size = torch.maximum(by_logprob.abs(), by_entropy.abs()).clamp(min=1e-30)
            row_factor = -head.scale * size
            gradient_rows[(stop - start,)](
                logits,
                stored,
                bias,
                head.targets[here],
                *rows[2:, here],
                (by_logprob / size).contiguous(),
                (by_entropy / size).contiguous(),
                *shape,
                **kernel_options,
            )
        else:
            row_factor = -head.scale * by_logprob / rows[3, here]
        exponentials = stored[: stop - start]
        if d_hidden is not None:
            product = torch.empty(stop - start, width, **real)
            d_hidden[here] = _product(exponentials, weight, product).mul_(row_factor.unsqueeze(1))
        beta = 0.0 if start == 0 else 1.0
        if d_weight is not None:
            _add_product(exponentials.t(), hidden[here], row_factor, d_weight, beta)
        if d_bias is not None:
            ones = torch.ones(stop - start, 1, dtype=hidden.dtype, device=hidden.device)
            _add_product(exponentials.t(), ones, row_factor, d_bias.unsqueeze(1), beta)
    return HeadOutput(
        rows[0],
        rows[1],
        d_hidden,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None or head.bias is None else d_bias.to(head.bias.dtype),
    )


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right in float32, operands as they are (the interpreter's CPU tensors: in float32)."""
    if left.dtype == torch.float32 or not left.is_cuda:
        return torch.mm(left.float(), right.float(), out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add_product(left: Tensor, rows: Tensor, factor: Tensor, out: Tensor, beta: float) -> None:
    """out = beta · out + left @ (factor ⊙ rows), accumulated in float32."""
    if rows.dtype == torch.float16:
        # A small normalizer must not underflow float16: the largest factor goes round the product.
        unit = factor.abs().amax().clamp(min=1e-30)
        scaled = (rows * (factor / unit).unsqueeze(1)).to(rows.dtype)
        product = _product(left, scaled, torch.empty_like(out)).mul_(unit)
        out.copy_(product if beta == 0.0 else out + product)
        return
    scaled = (rows * factor.unsqueeze(1)).to(rows.dtype)
    if rows.dtype == torch.float32 or not rows.is_cuda:
        torch.addmm(out, left.float(), scaled.float(), beta=beta, out=out)
    else:
        torch.addmm(out, left, scaled, out_dtype=torch.float32, beta=beta, out=out)
