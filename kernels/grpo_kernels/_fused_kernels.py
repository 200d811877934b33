"""Triton kernels of the fused loss head: a matrix product whose epilogue is the softmax.

The reference of a row, its target's own logit, is known before the product (``reference_rows``). So a tile of
logits becomes exponentials while it is still in registers: what leaves the product is two partial sums a row
and column tile, and E′ where gradients are wanted, never a logit. ``finish_rows`` adds the partial sums up.

Rows whose sum passes the limit are done again against their maximum (the product for the maxima, then
``raise_references``, the product for the sums, ``finish_rows``), launched always and leaving at once where
no row asks for it: the host need not know.

Sums are added in one order, without atomics: the same call gives the same bits. Written in the subset that
the interpreter runs. Arithmetic is float32 whatever is stored; row offsets are 64-bit.

n rows of a chunk, H hidden size, V vocabulary, P columns of the padded rows, C column tiles of V, E and E′ as in
``kernels/README.md``.
"""

from typing import NamedTuple

import torch
import triton.language as tl

from ._row_kernels import (
    EXPONENT_LIMIT,
    LARGEST_SUM,
    LOWEST_BIAS,
    NO_STORE,
    STORE_PROBABILITIES,
    _exponent,
    _log1p,
    jit,
)

MAXIMA = tl.constexpr(3)  # a fourth mode beside the three ways to store: row maxima instead of sums


class Tile(NamedTuple):
    """Shape of one program's product, and how it is run."""

    rows: int
    columns: int
    depth: int  # of H, at once
    stages: int
    warps: int
    descriptors: bool  # whether operands come through tensor descriptors


# (compute capability's major number, bytes of an element) -> tile. 16-bit tiles of 128 x 256 keep the tensor
# cores of sm_90 and sm_100 busy from shared memory, at 8 warps and 128 sums a thread; what the stages leave of
# that memory holds the tile on its way out. sm_80 has less of it, and its operands pass through registers.
# float32 takes three products of tf32. No variant spills; reasoned from the compiled kernels, not measured.
_TILES = {
    (8, 2): Tile(128, 128, 64, 3, 8, False),
    (8, 4): Tile(64, 64, 32, 3, 4, False),
    (9, 2): Tile(128, 256, 64, 3, 8, True),
    (9, 4): Tile(64, 128, 32, 3, 4, True),
    (10, 2): Tile(128, 256, 64, 3, 8, True),
    (10, 4): Tile(64, 128, 32, 3, 4, True),
}
# Row tiles that go through the columns together: what 132 programs have in hand at once is then about as many
# rows as columns, the least to bring into L2.
GROUP = tl.constexpr(16)


def tile_for(major: int, dtype: torch.dtype, *, describable: bool) -> Tile:
    """The tile of every product, for a compute capability, the head's dtype and what its addresses allow."""
    newest = max(key[0] for key in _TILES)
    return _TILES[(min(max(major, 8), newest) if describable else 8, dtype.itemsize)]


@jit
def reference_rows(
    hidden,  # (n, H)
    weight,  # (V, H)
    bias,  # (V,) any float; any pointer where HAS_BIAS is off
    targets,  # (n,) int32 or int64
    places,  # (n,) int32: the target, or -1 where it is out of range
    own_logits,  # (n,) float32: the target's exponent, this and both below
    own_slopes,  # (n,) derivative of the cap there
    references,  # (n,) what exponents are relative to: the same as own_logits
    overflow,  # (1,) int32: set to 0
    width,
    vocabulary,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row's own logit, by a product of the row with its target's weights; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    known = (target >= 0) & (target < vocabulary)
    column = tl.where(known, target, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        left = tl.load(hidden + row * hidden_row + k * hidden_column, mask=k < width, other=0.0)
        right = tl.load(weight + column * weight_row + k * weight_column, mask=k < width, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    raw = tl.sum(total, 0)
    logit, slope = _exponent(raw, bias, column, column >= 0, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    tl.store(places + row, tl.where(known, target, -1).to(tl.int32))
    tl.store(own_logits + row, logit)
    tl.store(own_slopes + row, slope)
    tl.store(references + row, logit)
    if row == 0:
        tl.store(overflow, 0)


@jit
def _halves(matrix):
    """Left and right half of the columns."""
    parts = tl.reshape(matrix, (matrix.shape[0], 2, matrix.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@jit
def fused_rows(
    hidden,  # (n, H), or its descriptor with blocks of (BLOCK_ROWS, BLOCK_DEPTH)
    weight,  # (V, H), or its descriptor with blocks of (BLOCK_COLUMNS, BLOCK_DEPTH)
    bias,  # (V,) any float; any pointer where HAS_BIAS is off
    places,  # (n,) int32
    references,  # (n,) float32
    wholes,  # (n,) float32; read for STORE_PROBABILITIES only
    others,  # (n,) float32; read for REDO only
    overflow,  # (1,) int32; read for REDO only
    totals,  # (C, n) float32: sum of exponentials, or the largest exponent for MAXIMA
    spreads,  # (C, n) float32: sum of exponential times exponent
    stored,  # (n, P): E, or E/(1 + s) for STORE_PROBABILITIES, 0 at the target; any pointer where not stored
    n,
    width,
    vocabulary,
    padded,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MODE: tl.constexpr,
    SLOPED: tl.constexpr,  # whether what is stored has the cap's slope as a factor
    REDO: tl.constexpr,  # only rows whose sum passed the limit, if there are any
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Tiles of hidden weightᵀ, each turned at once into what its rows need of it; a persistent grid.

    The target's column counts for the maxima only. STORE_PROBABILITIES finds the sums known and leaves them.
    """
    PIECE: tl.constexpr = BLOCK_COLUMNS // 8
    row_tiles = tl.cdiv(n, BLOCK_ROWS)
    tiles = row_tiles * tl.cdiv(vocabulary, BLOCK_COLUMNS)
    if REDO:
        tiles *= tl.load(overflow)
    per_group = GROUP * tl.cdiv(vocabulary, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=not (REDO or HAS_SOFTCAP)):
        first = tile // per_group * GROUP
        size = tl.minimum(row_tiles - first, GROUP)
        first_row = (first + tile % per_group % size) * BLOCK_ROWS
        column_tile = tile % per_group // size
        first_column = column_tile * BLOCK_COLUMNS
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        mine = rows < n
        depth = width
        if REDO:
            mine = mine & (tl.load(others + rows, mask=mine, other=0.0) > LARGEST_SUM)
            depth = tl.where(tl.max(mine.to(tl.int32), 0) > 0, width, 0)  # other tiles skip the product
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, depth, BLOCK_DEPTH):
            if DESCRIPTORS:
                left = hidden.load([first_row, start])
                right = weight.load([first_column, start])
            else:
                k = start + tl.arange(0, BLOCK_DEPTH)
                left = tl.load(
                    hidden + rows.to(tl.int64)[:, None] * hidden_row + k[None, :] * hidden_column,
                    mask=(rows < n)[:, None] & (k < width)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    weight + columns.to(tl.int64)[:, None] * weight_row + k[None, :] * weight_column,
                    mask=(columns < vocabulary)[:, None] & (k < width)[None, :],
                    other=0.0,
                )
            product = tl.dot(left, right.T, product, input_precision=PRECISION)
        # An eighth at a time: what the whole tile needs at once are more registers than there are.
        halves = _halves(product)
        quarters = _halves(halves[0]) + _halves(halves[1])
        pieces = _halves(quarters[0]) + _halves(quarters[1]) + _halves(quarters[2]) + _halves(quarters[3])
        reference = tl.zeros((BLOCK_ROWS,), tl.float32)
        place = rows * 0
        if MODE != MAXIMA:
            reference = tl.load(references + rows, mask=mine, other=0.0)
            place = tl.load(places + rows, mask=mine, other=-1)
        if MODE == STORE_PROBABILITIES:
            reference += tl.log(tl.load(wholes + rows, mask=mine, other=1.0))
        line = stored + rows.to(tl.int64)[:, None] * padded
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        spread = tl.zeros((BLOCK_ROWS,), tl.float32)
        if MODE == MAXIMA:
            total += float("-inf")
        for piece in tl.static_range(8):
            columns = first_column + piece * PIECE + tl.arange(0, PIECE)[None, :]
            inside = columns < vocabulary
            logit, slope = _exponent(
                pieces[piece], bias, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP
            )
            if MODE == MAXIMA:
                total = tl.maximum(total, tl.max(tl.where(inside, logit, float("-inf")), 1))
            else:
                counted = inside & (columns != place[:, None])
                exponent = tl.where(counted, logit - reference[:, None], LOWEST_BIAS)
                value = tl.exp(tl.minimum(exponent, EXPONENT_LIMIT, propagate_nan=tl.PropagateNan.ALL))
                total += tl.sum(value, 1)
                spread += tl.sum(value * exponent, 1)
                if MODE != NO_STORE:
                    if SLOPED:
                        value = tl.where(counted, value * slope, 0.0)
                    tl.store(
                        line + columns,
                        value.to(stored.dtype.element_ty),
                        mask=mine[:, None] & (columns < padded),
                    )
        sums = column_tile.to(tl.int64) * n + rows
        if MODE != STORE_PROBABILITIES:
            tl.store(totals + sums, total, mask=mine)
            if MODE != MAXIMA:
                tl.store(spreads + sums, spread, mask=mine)


@jit
def finish_rows(
    totals,  # (C, n) float32
    spreads,  # (C, n) float32
    stored,  # (n, P); any pointer for NO_STORE
    places,  # (n,) int32
    own_logits,  # (n,) float32, this and all below
    own_slopes,  # (n,)
    logprobs,  # (n,)
    entropies,  # (n,)
    wholes,  # (n,) sum of all exponentials
    others,  # (n,) sum of all exponentials but the target's
    references,  # (n,)
    overflow,  # (1,) int32: set to 1 where a row's sum passes the limit, unless this is REDO
    n,
    column_tiles,
    padded,
    STORE: tl.constexpr,
    SLOPED: tl.constexpr,
    REDO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Adds the partial sums up, and puts what belongs there at the target's place of the stored rows."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mine = rows < n
    if REDO:
        column_tiles *= tl.load(overflow)
        mine = mine & (tl.load(others + rows, mask=mine, other=0.0) > LARGEST_SUM)
    total = tl.zeros((BLOCK_TILES, BLOCK_ROWS), tl.float32)
    spread = tl.zeros((BLOCK_TILES, BLOCK_ROWS), tl.float32)
    for start in range(0, column_tiles, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES)
        sums = tiles.to(tl.int64)[:, None] * n + rows[None, :]
        some = (tiles < column_tiles)[:, None] & mine[None, :]
        total += tl.load(totals + sums, mask=some, other=0.0)
        spread += tl.load(spreads + sums, mask=some, other=0.0)
    total = tl.sum(total, 0)
    spread = tl.sum(spread, 0)
    place = tl.load(places + rows, mask=mine, other=-1)
    reference = tl.load(references + rows, mask=mine, other=0.0)
    own_exponent = tl.load(own_logits + rows, mask=mine, other=0.0) - reference
    own = tl.exp(own_exponent)
    whole = total + own
    mean = (spread + own * own_exponent) / whole
    log_whole = tl.where(own == 1.0, _log1p(total), tl.log(whole))
    logprob = tl.where(place >= 0, own_exponent - log_whole, float("nan"))
    tl.store(logprobs + rows, logprob, mask=mine)
    tl.store(entropies + rows, log_whole - mean, mask=mine)
    tl.store(wholes + rows, whole, mask=mine)
    tl.store(others + rows, total, mask=mine)
    if STORE != NO_STORE:
        value = -total
        if SLOPED:
            value *= tl.load(own_slopes + rows, mask=mine, other=1.0)
        if STORE == STORE_PROBABILITIES:
            value /= whole
        tl.store(
            stored + rows.to(tl.int64) * padded + place,
            value.to(stored.dtype.element_ty),
            mask=mine & (place >= 0),
        )
    if not REDO:
        passes = tl.max((mine & (total > LARGEST_SUM)).to(tl.int32), 0)
        tl.store(overflow, 1, mask=passes > 0)  # every program that does so writes the same


@jit
def raise_references(
    maxima,  # (C, n) float32, as MAXIMA left them
    references,  # (n,) float32: the row's maximum, where the row's sum passed the limit
    others,  # (n,) float32
    overflow,  # (1,) int32
    n,
    column_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """The row maximum as the reference of rows whose sum passed the limit."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mine = rows < n
    mine = mine & (tl.load(others + rows, mask=mine, other=0.0) > LARGEST_SUM)
    best = tl.full((BLOCK_TILES, BLOCK_ROWS), float("-inf"), tl.float32)
    column_tiles *= tl.load(overflow)
    for start in range(0, column_tiles, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES)
        sums = tiles.to(tl.int64)[:, None] * n + rows[None, :]
        some = (tiles < column_tiles)[:, None] & mine[None, :]
        best = tl.maximum(best, tl.load(maxima + sums, mask=some, other=float("-inf")))
    tl.store(references + rows, tl.max(best, 0), mask=mine)
