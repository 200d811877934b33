"""The loss head in chunked PyTorch: any device, and the fast path of the CPU.

A chunk of n tokens is worked through in column blocks that stay in cache: product, exponential, row sum and
the product for dX follow each other while the block is warm. The target-referenced softmax makes that
possible: its reference, the target's own logit, is known before the first block, so no maximum has to be
found first. Only the dW product must wait for the row sums; the exponentials of one chunk are kept for it,
and nothing else.

The exponential is exp2(x log2 e), the factor put on when the reference is off: on the CPU exp2 takes 0.6 of the
time of exp.

N tokens, n of a chunk, H hidden size, V vocabulary, E exponentials as in ``kernels/README.md``.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._head import Coefficients, Head, HeadOutput, Needs, chunk_rows, run_chunks

SCRATCH_BYTES = 200 << 20  # kept exponentials of one chunk
BLOCK_BYTES = 2 << 20  # one column block
MOST_ROWS = 1024  # beyond this the products gain nothing and the blocks leave the cache
LOG2_E, LN_2 = 1 / math.log(2), math.log(2)
LARGEST_SUM = 2.0**60  # a row sum beyond this is redone against the row maximum
LOWEST_BIAS = -1e30  # stands for -inf: its exponential is 0, and 0 · LOWEST_BIAS is no NaN


def torch_head(head: Head, needs: Needs, coefficients: Coefficients | None) -> HeadOutput:
    """Log-probs and entropies, and the gradients asked for, in one pass over token chunks."""
    if head.targets.device.type == "cpu":  # they have been looked at
        return run_chunks(head, needs, coefficients, _TorchSteps(head, needs))
    last = head.weight.shape[0] - 1
    inside = replace(head, targets=head.targets.clamp(0, last))
    output = run_chunks(inside, needs, coefficients, _TorchSteps(inside, needs))
    return replace(output, logprobs=torch.where(head.targets == inside.targets, output.logprobs, torch.nan))


@dataclass
class _Chunk:
    """One chunk after its forward sweep; everything of the accumulation dtype."""

    hidden: Tensor  # (n, H)
    targets: "_Targets"
    total: Tensor  # (n,) sum of all exponentials, the target's included
    others: Tensor  # (n,) sum of all exponentials but the target's
    own: Tensor  # (n,) exponential of the target: 1 unless the row was redone
    own_exponent: Tensor  # (n,)
    own_slope: Tensor | float  # (n,) derivative of the soft cap at the target
    mean_exponent: Tensor  # (n,) exponent averaged under the softmax
    product: Tensor | None  # (n, H) E′ weight, where the sweep could finish it
    logprobs: Tensor  # (n,)
    entropy: Tensor  # (n,)


class _TorchSteps:
    """Scratch of one call and the sweeps over it."""

    def __init__(self, head: Head, needs: Needs) -> None:
        self.head, self.needs = head, needs
        self.gradient_dtype = head.accumulate
        count, vocabulary = head.hidden.shape[0], head.weight.shape[0]
        itemsize = head.accumulate.itemsize
        self.keeps = needs.weight or needs.bias or needs.entropy
        matrices = 2 if needs.entropy else 1
        budget = SCRATCH_BYTES if self.keeps else MOST_ROWS * vocabulary * itemsize
        self.rows = min(MOST_ROWS, chunk_rows(count, matrices * vocabulary * itemsize, budget))
        block = min(vocabulary, max(256, BLOCK_BYTES // (self.rows * itemsize)))
        self.blocks = [(v, min(v + block, vocabulary)) for v in range(0, vocabulary, block)]
        columns = vocabulary if self.keeps else block
        like = {"dtype": head.accumulate, "device": head.hidden.device}
        self.exponentials = torch.empty(self.rows * columns, **like)
        self.weighted = torch.empty(self.rows * columns, **like) if needs.entropy else None
        self.temporary = torch.empty(self.rows * block, **like)
        self.bias = (
            None if head.bias is None else head.bias.detach().to(head.accumulate).clamp(min=LOWEST_BIAS)
        )

    def _view(self, buffer: Tensor, rows: int, first: int, last: int) -> Tensor:
        start = rows * first if self.keeps and buffer is not self.temporary else 0
        return buffer[start : start + rows * (last - first)].view(rows, last - first)

    def _weight(self, first: int, last: int) -> Tensor:
        return self.head.weight[first:last].to(self.head.accumulate)

    def _logits(self, hidden: Tensor, first: int, last: int, out: Tensor) -> Tensor:
        """Logits of a block before cap and scale, into out (n, last - first)."""
        torch.mm(hidden, self._weight(first, last).t(), out=out)
        return out if self.bias is None else out.add_(self.bias[first:last])

    def forward(self, rows: slice) -> _Chunk:
        """Log-probs and entropies of a chunk; rows whose sum overflows are swept again."""
        head = self.head
        hidden = head.hidden[rows].to(head.accumulate)
        targets = _Targets(head.targets[rows], self.blocks)
        raw = (hidden * head.weight[targets.tokens].to(head.accumulate)).sum(1)
        if self.bias is not None:
            raw = raw + self.bias[targets.tokens]
        own_slope: Tensor | float = 1.0
        if head.softcap is not None:
            bent = torch.tanh(raw / head.softcap)
            raw, own_slope = bent * head.softcap, 1.0 - bent * bent
        own_logit = raw * head.scale
        chunk = self._sweep(hidden, targets, own_logit, own_logit, own_slope)
        overflowed = ~(chunk.others <= LARGEST_SUM)
        if bool(overflowed.any()):
            reference = torch.where(overflowed, self._row_maximum(hidden), own_logit)
            chunk = self._sweep(hidden, targets, own_logit, reference, own_slope)
        return chunk

    def _row_maximum(self, hidden: Tensor) -> Tensor:
        """Largest exponent of each row, (n,)."""
        head, best = self.head, torch.full_like(hidden[:, 0], -torch.inf)
        for first, last in self.blocks:
            logits = self._logits(hidden, first, last, self._view(self.temporary, len(hidden), first, last))
            if head.softcap is not None:
                logits.div_(head.softcap).tanh_().mul_(head.softcap)
            best = torch.maximum(best, logits.mul_(head.scale).amax(1))
        return best

    def _sweep(
        self,
        hidden: Tensor,
        targets: "_Targets",
        own_logit: Tensor,
        reference: Tensor,
        own_slope: Tensor | float,
    ) -> _Chunk:
        """One pass over the vocabulary with exponents relative to reference (n,)."""
        head, needs, n = self.head, self.needs, len(hidden)
        own_exponent = own_logit - reference
        own = own_exponent.exp()
        others, spread = torch.zeros_like(reference), torch.zeros_like(reference)
        finish_product = needs.hidden and not needs.entropy
        product = torch.zeros_like(hidden) if finish_product else None
        # Σ E′ z is (E′ W)·h where z is linear in h: with dX at hand the entropy costs no further pass.
        entropy_from_product = finish_product and head.softcap is None
        shift = -reference.unsqueeze(1)
        for index, (first, last) in enumerate(self.blocks):
            block = self._view(self.exponentials, n, first, last)
            # The entropy's second sum needs the exponents beside their exponentials.
            exponents = block if entropy_from_product else self._view(self.temporary, n, first, last)
            slope = None
            if head.softcap is None:
                weight = self._weight(first, last).t()
                torch.addmm(shift, hidden, weight, alpha=head.scale, out=exponents)
                if self.bias is not None:
                    exponents.add_(self.bias[first:last] * head.scale)
            else:
                bent = self._logits(hidden, first, last, exponents).div_(head.softcap).tanh_()
                slope = 1.0 - bent * bent
                bent.mul_(head.softcap * head.scale).add_(shift)
            targets.clear(torch.exp2(exponents.mul_(LOG2_E), out=block), index)
            others += block.sum(1)
            if entropy_from_product:
                if self.bias is not None:
                    spread.addmv_(block, self.bias[first:last], alpha=head.scale)
            else:
                spread += exponents.mul_(block).sum(1)
                if self.weighted is not None:
                    weighted = self._view(self.weighted, n, first, last).copy_(exponents)
                    if slope is not None:
                        weighted.mul_(slope)
                if slope is not None:
                    block.mul_(slope)
            if product is not None:
                product.addmm_(block, self._weight(first, last))
        total = others + own
        if product is not None:
            own_weight = head.weight[targets.tokens].to(head.accumulate)
            product.addcmul_(own_weight, (others * own_slope).unsqueeze(1), value=-1.0)
        if entropy_from_product:
            assert product is not None
            spread += (product * hidden).sum(1) * head.scale
            if self.bias is not None:
                spread -= others * self.bias[targets.tokens] * head.scale
            mean_exponent = spread / total + own_exponent
        else:
            mean_exponent = (spread * LN_2 + own * own_exponent) / total
        # others/own is exact where the target is nearly certain; the other form where own underflows.
        rare = own_exponent < -40.0
        logprobs = torch.where(rare, own_exponent - total.log(), -torch.log1p(others / own))
        return _Chunk(
            hidden=hidden,
            targets=targets,
            total=total,
            others=others,
            own=own,
            own_exponent=own_exponent,
            own_slope=own_slope,
            mean_exponent=mean_exponent,
            product=product,
            logprobs=logprobs,
            entropy=total.log() - mean_exponent,
        )

    def finish(self, chunk: _Chunk, by_logprob: Tensor, by_entropy: Tensor | None) -> Tensor:
        """Turns the kept exponentials into the derivative by the logits, up to a factor a row, (n,)."""
        n = len(chunk.hidden)
        own_value = -chunk.others * chunk.own_slope
        row_factor = -self.head.scale * by_logprob / chunk.total
        if self.needs.entropy:
            assert self.weighted is not None and by_entropy is not None
            direct = by_logprob - by_entropy * chunk.mean_exponent
            for first, last in self.blocks:
                block = self._view(self.exponentials, n, first, last)
                weighted = self._view(self.weighted, n, first, last)
                block.mul_(direct.unsqueeze(1)).addcmul_(weighted, (by_entropy * LN_2).unsqueeze(1))
            pull = by_entropy * chunk.own * (chunk.own_exponent - chunk.mean_exponent)
            own_value = by_logprob * own_value + pull * chunk.own_slope
            row_factor = -self.head.scale / chunk.total
        if self.keeps:
            chunk.targets.put(self.exponentials, own_value)
        return row_factor

    def grad_hidden(self, chunk: _Chunk, row_factor: Tensor) -> Tensor:
        """dX of the chunk, (n, H)."""
        product = chunk.product
        if product is None:
            product = torch.zeros_like(chunk.hidden)
            for first, last in self.blocks:
                block = self._view(self.exponentials, len(product), first, last)
                product.addmm_(block, self._weight(first, last))
        return product * row_factor.unsqueeze(1)

    def add_grad_weight(
        self, chunk: _Chunk, row_factor: Tensor, d_weight: Tensor | None, d_bias: Tensor | None, beta: float
    ) -> None:
        """Adds the chunk's share to beta times dW (V, H) and db (V,)."""
        scaled = chunk.hidden * row_factor.unsqueeze(1)
        for first, last in reversed(self.blocks):  # the last ones may still be in cache
            block = self._view(self.exponentials, len(scaled), first, last).t()
            if d_weight is not None:
                d_weight[first:last].addmm_(block, scaled, beta=beta)
            if d_bias is not None:
                d_bias[first:last].addmv_(block, row_factor, beta=beta)


class _Targets:
    """Where the targets of a chunk lie in its blocks, each block (n, columns) contiguous."""

    def __init__(self, targets: Tensor, blocks: list[tuple[int, int]]) -> None:
        self.tokens = targets  # (n,) int64
        ordered, self.order = targets.sort()
        firsts = torch.tensor([first for first, _ in blocks], device=targets.device)
        widths = torch.tensor([last - first for first, last in blocks], device=targets.device)
        block = torch.searchsorted(firsts, ordered, right=True) - 1
        self.inside = (
            self.order * widths[block] + ordered - firsts[block]
        )  # place in the block, in that order
        self.kept = self.inside + len(targets) * firsts[block]  # place among all blocks one after the other
        self.bounds = [
            0,
            *torch.searchsorted(block, torch.arange(1, len(blocks), device=block.device)).tolist(),
        ]
        self.bounds.append(len(targets))

    def clear(self, block: Tensor, index: int) -> None:
        """Sets the target columns that lie in this block to 0."""
        first, last = self.bounds[index], self.bounds[index + 1]
        if first != last:
            block.view(-1).index_fill_(0, self.inside[first:last], 0.0)

    def put(self, exponentials: Tensor, value: Tensor) -> None:
        """Sets the target column of each row to its value (n,), in all blocks."""
        exponentials.index_copy_(0, self.kept, value[self.order])
