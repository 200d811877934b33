"""``group_advantages`` as Triton kernels: a program takes some whole groups and all their rewards at once.

One launch where a group is all that counts. A standard deviation over the batch takes two more: each program
leaves count, mean and squared deviations of its rows, and these are put together before they are used; no
atomics, so the same inputs give the same bits.

Arithmetic is float64: rewards may be large and their spread tiny. S sequences in P groups, R reward heads, Q
programs; blocks are (GROUPS, MEMBERS), one row a group.
"""

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._loss_kernels import require_gpu

jit: Any = triton.jit  # the checker cannot follow what it makes of a function

TILE = 512  # sequences of a program, if no group is larger
ELEMENTS = 8  # at most a thread's share of them: some 120 registers; groups beyond 4096 have more, and spill
BLOCK = 1024  # of what runs over sequences or programs
ROUNDING = tl.constexpr(1e-7)  # a spread below this share of the rewards' magnitude is rounding, not signal


@jit
def _total(values):
    return tl.sum(tl.sum(values, 1), 0)


@jit
def _leave_moments(partials, slot, values, seen):
    """Count, mean and squared deviations of what is seen of a block, for ``batch_spread``."""
    count = _total(seen.to(tl.float64))
    mean = _total(tl.where(seen, values, 0.0)) / tl.maximum(count, 1.0)
    off = tl.where(seen, values - mean, 0.0)
    programs = tl.num_programs(0)
    column = partials + slot * 3 * programs + tl.program_id(0)
    tl.store(column, count)
    tl.store(column + programs, mean)
    tl.store(column + 2 * programs, _total(off * off))


@jit
def _spread(off, seen):
    """Standard deviation, ddof 1, of values of mean zero: (GROUPS, 1)."""
    count = tl.sum(seen.to(tl.float64), 1)
    return tl.sqrt(tl.sum(off * off, 1) / tl.maximum(count - 1.0, 1.0))[:, None]


@jit
def _flat(spread, magnitude, STD_FLOOR: tl.constexpr):
    """Whether the group's spread carries no signal: (GROUPS, 1)."""
    floor = tl.full((1, 1), STD_FLOOR, tl.float64)
    return spread <= tl.maximum(tl.max(magnitude, 1)[:, None] * ROUNDING, floor)


@jit
def _scaled(off, spread, flat, batch, SCALE: tl.constexpr, EPS: tl.constexpr):
    divisor = tl.full((1, 1), EPS, tl.float64)
    if SCALE == "group":
        divisor += spread
    elif SCALE == "batch":
        divisor += batch
    if SCALE != "none":
        off = off * (1.0 / tl.where(flat, 1.0, divisor))  # one division a group
    return tl.where(flat, 0.0, off)


@jit
def group_rows(
    rewards,  # (S, R) of any type; NaN where a head gave no value
    offsets,  # (P+1,) int64, or None: all groups have `size` members
    weights,  # (R,) float64, or None: ones
    batch_spreads,  # (R,) float64, or (1,) of the weighted sum; None unless SCALE is "batch"
    advantages,  # (S,) out, float32 or float64; None: only the moments of the raw values
    partials,  # (R or 1, 3, Q) float64 out: moments of the raw values, or else of the advantages; or None
    groups,
    size,
    heads,
    MODE: tl.constexpr,
    SCALE: tl.constexpr,
    STD_FLOOR: tl.constexpr,
    EPS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Advantages within each group, gdpo's before they are divided by their spread over the batch."""
    summed: tl.constexpr = (MODE == "scalarized") | (MODE == "leave_one_out")
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, MEMBERS)[None, :]
    first = group * size
    length = size
    if offsets is not None:
        first = tl.load(offsets + group, mask=group < groups, other=0)
        length = tl.load(offsets + group + 1, mask=group < groups, other=0) - first
    here = (group < groups) & (member < length)
    row = first + member

    zeros = tl.zeros((GROUPS, MEMBERS), tl.float64)
    result = (
        zeros  # the sum over heads: of what has been divided, or of what dvao and the sums divide at last
    )
    magnitude = zeros
    raw = zeros
    present = here & (member < 0)
    divisor = tl.full((GROUPS, 1), EPS, tl.float64)
    batch = divisor
    for head in range(heads):
        value = tl.load(rewards + row * heads + head, mask=here, other=0.0).to(tl.float64)
        seen = here & (value == value)
        value = tl.where(seen, value, 0.0)
        weight = tl.full((1, 1), 1.0, tl.float64)
        if weights is not None:
            weight *= tl.load(weights + head)
        count = tl.sum(seen.to(tl.float64), 1)[:, None]
        mean = tl.sum(value, 1)[:, None] / tl.maximum(count, 1.0)
        off = tl.where(seen, value - mean, 0.0)
        if summed:
            result += weight * off
            magnitude += tl.abs(weight * value)
            raw += weight * tl.where(seen, value, mean)
            present = present | seen
        elif advantages is None:
            _leave_moments(partials, head, value, seen)
        else:
            if batch_spreads is not None:
                batch = tl.full((GROUPS, 1), 0.0, tl.float64) + tl.load(batch_spreads + head)
            spread = _spread(off, seen)
            flat = _flat(spread, tl.abs(value), STD_FLOOR)
            if MODE == "dvao":
                result += weight * tl.where(flat, 0.0, off)
                if SCALE == "group":
                    divisor += tl.abs(weight) * spread
                else:
                    divisor += tl.abs(weight) * batch
            else:
                result += weight * _scaled(off, spread, flat, batch, SCALE, EPS)
    if summed:
        if advantages is None:
            _leave_moments(partials, 0, raw, present)
        else:
            if batch_spreads is not None:
                batch = tl.full((GROUPS, 1), 0.0, tl.float64) + tl.load(batch_spreads)
            spread = _spread(result, present)
            result = _scaled(result, spread, _flat(spread, magnitude, STD_FLOOR), batch, SCALE, EPS)
            if MODE == "leave_one_out":
                count = tl.sum(present.to(tl.float64), 1)[:, None]
                result *= count / tl.maximum(count - 1.0, 1.0)
    if MODE == "dvao":
        result *= tl.where(divisor > 0.0, 1.0 / tl.where(divisor > 0.0, divisor, 1.0), 0.0)
    if advantages is not None:
        tl.store(advantages + row, result.to(advantages.dtype.element_ty), mask=here)
        if partials is not None:
            _leave_moments(partials, 0, result, here)


@jit
def batch_spread(
    partials,  # (K, 3, Q) float64, as `group_rows` leaves them
    spreads,  # (K,) float64 out
    programs,
    BLOCK: tl.constexpr,
):
    """Standard deviations over the batch, one program each."""
    slot = tl.program_id(0)
    counts = partials + slot * 3 * programs
    count_sums = tl.zeros((BLOCK,), tl.float64)
    value_sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < programs
        count = tl.load(counts + column, mask=inside, other=0.0)
        count_sums += count
        value_sums += count * tl.load(counts + programs + column, mask=inside, other=0.0)
    total = tl.sum(count_sums, 0)
    mean = tl.sum(value_sums, 0) / tl.maximum(total, 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < programs
        count = tl.load(counts + column, mask=inside, other=0.0)
        off = tl.load(counts + programs + column, mask=inside, other=0.0) - mean
        squares += tl.load(counts + 2 * programs + column, mask=inside, other=0.0) + count * off * off
    tl.store(spreads + slot, tl.sqrt(tl.sum(squares, 0) / tl.maximum(total - 1.0, 1.0)))


@jit
def standardise(
    values,  # (S,) float64
    spread,  # (1,) float64
    advantages,  # (S,) float32 out
    count,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divides by the spread over the batch; all zeros, whose spread is zero, stay so without an eps too."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    divisor = tl.load(spread) + tl.full((1,), EPS, tl.float64)
    value = tl.load(values + index, mask=index < count, other=0.0)
    value *= tl.where(divisor > 0.0, 1.0 / tl.where(divisor > 0.0, divisor, 1.0), 0.0)
    tl.store(advantages + index, value.to(tl.float32), mask=index < count)


def advantages_of_groups(
    rewards: Tensor,  # (S, R)
    sizes: list[int],
    weights: Tensor | None,  # (R,) float64
    *,
    mode: str,
    scale: str,
    std_floor: float,
    eps: float,
) -> Tensor:
    """(S,) float32, from arguments that were checked; S is not 0."""
    device, (count, heads) = rewards.device, rewards.shape
    require_gpu(device)
    rewards = (rewards.view(torch.uint8) if rewards.dtype == torch.bool else rewards).contiguous()
    widest = max(sizes)
    offsets = None
    if min(sizes) != widest:
        offsets = torch.tensor([0, *accumulate(sizes)]).to(device, non_blocking=True)
    members: int = triton.next_power_of_2(widest)  # type: ignore[assignment]
    at_once = max(1, TILE // members)
    programs = -(-len(sizes) // at_once)

    def launch(spreads: Tensor | None, out: Tensor | None, partials: Tensor | None) -> None:
        group_rows[(programs,)](
            rewards,
            offsets,
            weights,
            spreads,
            out,
            partials,
            len(sizes),
            widest,
            heads,
            MODE=mode,
            SCALE=scale,
            STD_FLOOR=float(std_floor),
            EPS=float(eps),
            GROUPS=at_once,
            MEMBERS=members,
            num_warps=min(16, max(4, at_once * members // (32 * ELEMENTS))),
        )

    def moments(slots: int) -> Tensor:
        return torch.empty(slots, 3, programs, dtype=torch.float64, device=device)

    def spread_of(partials: Tensor) -> Tensor:
        spreads = torch.empty(len(partials), dtype=torch.float64, device=device)
        batch_spread[(len(partials),)](partials, spreads, programs, BLOCK=BLOCK)
        return spreads

    spreads = None
    if scale == "batch":
        raw = moments(1 if mode in ("scalarized", "leave_one_out") else heads)
        launch(None, None, raw)
        spreads = spread_of(raw)
    advantages = torch.empty(count, dtype=torch.float32, device=device)
    if mode != "gdpo":
        launch(spreads, advantages, None)
        return advantages
    values, partials = torch.empty(count, dtype=torch.float64, device=device), moments(1)
    launch(spreads, values, partials)
    standardise[(-(-count // BLOCK),)](
        values, spread_of(partials), advantages, count, EPS=float(eps), BLOCK=BLOCK
    )
    return advantages
