"""What attention needs to know about one forward pass: who attends to whom, and where the keys are.

A plan travels from `model.base_model(..., plan=plan)` through the model's keyword arguments to every layer's
attention. `PackedPlan` describes sequences laid side by side, `PrefillPlan` also keeps the keys and values it
meets, and `DecodePlan` owns a KV cache and describes one new token for each of its rows.

Letters: L packed positions, S segments, H query heads, K key heads, G = H / K, D head width, B rows, T slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

CHUNK_SCORES = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Scores (float32) of one padded chunk: few enough for a core's cache, or many enough to fill a GPU."""

TILE_ROWS = 256
"""Queries of one tile of a layer with a sliding window."""


@dataclass(frozen=True)
class Chunk:
    """Segments of similar length as one rectangle, padded on the right."""

    rows: int
    q_max: int
    k_max: int
    q_index: Tensor
    """(K·rows·G·q_max,) int64 into the (L·H) query rows; padding repeats the segment's last query."""
    k_index: Tensor
    """(K·rows·k_max,) int64 into the (L·K) key rows; padding repeats the segment's last key."""
    kept: Tensor
    """(n,) int64: which of the `q_index` entries are no padding."""
    valid: Tensor
    """(rows, 1, q_max, 1) float32: 1 for a query, 0 for padding."""
    mask: Tensor
    """(rows or 1, 1, q_max, k_max) float32: 0 where a query may look, -inf elsewhere."""


@dataclass(frozen=True)
class Tile:
    """Some consecutive queries and some consecutive keys that they attend to; positions in the packed row."""

    queries: tuple[int, int]
    """First query and the one after the last."""
    keys: tuple[int, int]
    causal: bool = False
    """Query i sees the keys up to i (as many keys as queries); else all of them, or those of `mask`."""
    mask: Tensor | None = None
    """(queries, keys) float32: 0 where a query may look, -inf elsewhere; every query sees at least one key."""
    first: bool = True
    """Whether no tile before it has the same queries."""


@dataclass(frozen=True)
class PackedPlan:
    """Segments one after another in a row of L positions; each attends causally to itself and to its prefix.

    Segment s holds `q_lens[s]` positions, directly after those of segment s-1. Its keys are the
    `prefix_lens[s]` positions from `prefix_starts[s]` on (a prompt shared by several completions; length 0
    where there is none) followed by its own positions. Nothing else is visible to it.
    """

    q_lens: tuple[int, ...]
    prefix_starts: tuple[int, ...]
    prefix_lens: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _chunks: dict[tuple[int, int, int | None], list[Chunk]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _tiles: dict[int | None, list[Tile]] = field(default_factory=dict, repr=False, compare=False)
    block_masks: dict[tuple[int, int | None], Any] = field(default_factory=dict, repr=False, compare=False)
    """FlexAttention's block masks by padded length and window (`flex.py`)"""

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Self:
        """Independent sequences of the given lengths, no prefix shared."""
        zeros = (0,) * len(lengths)
        return cls(tuple(lengths), zeros, zeros, torch.device(device))

    def to(self, device: torch.device | str) -> PackedPlan:
        """The same plan with its index tensors on `device`."""
        return replace(self, device=torch.device(device), _chunks={}, _tiles={}, block_masks={})

    @cached_property
    def q_starts(self) -> tuple[int, ...]:
        """First position of each segment, and L as the last entry."""
        return tuple(accumulate(self.q_lens, initial=0))

    @property
    def length(self) -> int:
        """L, the number of positions."""
        return self.q_starts[-1]

    @cached_property
    def k_lens(self) -> tuple[int, ...]:
        """Number of keys of each segment: its prefix and itself."""
        return tuple(p + q for p, q in zip(self.prefix_lens, self.q_lens, strict=True))

    @cached_property
    def keys_per_query(self) -> float:
        """Number of keys of a segment, on the average over the row's positions."""
        return sum(q * k for q, k in zip(self.q_lens, self.k_lens, strict=True)) / self.length

    @cached_property
    def shares_prefix(self) -> bool:
        """Whether any segment has a prefix; if none has, keys and queries have the same layout."""
        return any(self.prefix_lens)

    @cached_property
    def cu_q(self) -> Tensor:
        """(S+1,) int32 on `device`: segment boundaries among the queries."""
        return torch.tensor(self.q_starts, dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def cu_k(self) -> Tensor:
        """(S+1,) int32 on `device`: segment boundaries among the gathered keys."""
        return torch.tensor((0, *accumulate(self.k_lens)), dtype=torch.int32).to(
            self.device, non_blocking=True
        )

    @cached_property
    def key_index(self) -> Tensor:
        """(sum of k_lens,) int64 on `device`: position of every gathered key."""
        index: list[int] = []
        for start, count, own, q_len in zip(
            self.prefix_starts, self.prefix_lens, self.q_starts, self.q_lens, strict=False
        ):
            index.extend(range(start, start + count))
            index.extend(range(own, own + q_len))
        return torch.tensor(index, dtype=torch.int64).to(self.device, non_blocking=True)

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Runs of segments (first, one after the last) that follow each other and have the same prefix."""
        prefixes = list(zip(self.prefix_starts, self.prefix_lens, strict=True))
        firsts = [s for s in range(len(prefixes)) if s == 0 or prefixes[s] != prefixes[s - 1]]
        return list(zip(firsts, [*firsts[1:], len(prefixes)], strict=True))

    def tiles(self, window: int | None) -> list[Tile]:
        """The row as rectangles, each segment's own keys before its prefix; made once, shared by all layers."""
        if window not in self._tiles:
            self._tiles[window] = self._make_tiles(window)
        return self._tiles[window]

    def _make_tiles(self, window: int | None) -> list[Tile]:
        tiles: list[Tile] = []
        masks: dict[tuple[int, int, int], Tensor] = {}

        def masked(queries: tuple[int, int], keys: tuple[int, int], distance: int, first: bool) -> Tile:
            """`distance`: from the first key to the first query, in the sequence."""
            assert window is not None
            shape = queries[1] - queries[0], keys[1] - keys[0], distance
            if shape not in masks:
                behind = distance + torch.arange(shape[0])[:, None] - torch.arange(shape[1])
                masks[shape] = torch.zeros(behind.shape).masked_fill_(
                    (behind < 0) | (behind >= window), float("-inf")
                )
            return Tile(queries, keys, mask=masks[shape], first=first)

        for first, end in self.groups:
            shared, prefix = self.prefix_lens[first], self.prefix_starts[first]
            for s in range(first, end):
                start, stop = self.q_starts[s : s + 2]
                if window is None or window >= stop - start:
                    for at in range(start, stop, TILE_ROWS):
                        rows = at, min(at + TILE_ROWS, stop)
                        tiles.append(Tile(rows, rows, causal=True))
                        if at > start:
                            tiles.append(Tile(rows, (start, at), first=False))
                    continue
                for at in range(start, stop, TILE_ROWS):
                    rows, low = (at, min(at + TILE_ROWS, stop)), max(start, at - window + 1)
                    tiles.append(masked(rows, (low, rows[1]), at - low, True))
            if not shared:
                continue
            if window is None or window >= shared + max(self.q_lens[first:end]):
                rows = self.q_starts[first], self.q_starts[end]
                tiles.append(Tile(rows, (prefix, prefix + shared), first=False))
                continue
            for s in range(first, end):
                reach = min(window - 1, self.q_lens[s])  # the queries that still see the prefix
                low = max(0, shared - window + 1)
                if reach:
                    rows = self.q_starts[s], self.q_starts[s] + reach
                    tiles.append(masked(rows, (prefix + low, prefix + shared), shared - low, False))
        return tiles

    def chunks(self, heads: int, key_heads: int, window: int | None) -> list[Chunk]:
        """The segments as padded rectangles of similar length; made once and shared by all layers."""
        wanted = (heads, key_heads, window)
        if wanted not in self._chunks:
            self._chunks[wanted] = self._make_chunks(heads, key_heads, window)
        return self._chunks[wanted]

    def _make_chunks(self, heads: int, key_heads: int, window: int | None) -> list[Chunk]:
        limit = CHUNK_SCORES.get(self.device.type, CHUNK_SCORES["cuda"])
        order = sorted(range(len(self.q_lens)), key=lambda s: (self.k_lens[s], self.q_lens[s]))
        chunks, members, q_max = [], [], 0
        for s in order:
            widest = max(q_max, self.q_lens[s])
            if members and (len(members) + 1) * widest * self.k_lens[s] * heads > limit:
                chunks.append(self._make_chunk(members, heads, key_heads, window))
                members, widest = [], self.q_lens[s]
            members.append(s)
            q_max = widest
        chunks.append(self._make_chunk(members, heads, key_heads, window))
        return chunks

    def _make_chunk(self, members: list[int], heads: int, key_heads: int, window: int | None) -> Chunk:
        columns = torch.tensor(
            [(self.q_starts[s], self.q_lens[s], self.prefix_starts[s], self.prefix_lens[s]) for s in members],
            dtype=torch.int64,
        ).to(self.device)
        start, q_len, prefix_start, prefix_len = (c[:, None] for c in columns.unbind(1))  # (rows, 1) each
        q_max = max(self.q_lens[s] for s in members)
        k_max = max(self.k_lens[s] for s in members)
        query = torch.arange(q_max, device=self.device)[None]  # (1, q_max)
        key = torch.arange(k_max, device=self.device)[None]  # (1, k_max)
        groups = heads // key_heads

        position = start + torch.minimum(query, q_len - 1)  # (rows, q_max)
        head = torch.arange(heads, device=self.device).view(key_heads, 1, groups, 1)
        q_index = (position[None, :, None] * heads + head).flatten()
        own = start + torch.minimum(key - prefix_len, q_len - 1)
        position = torch.where(key < prefix_len, prefix_start + key, own)  # (rows, k_max)
        k_index = (
            position[None] * key_heads + torch.arange(key_heads, device=self.device).view(-1, 1, 1)
        ).flatten()

        valid = query < q_len  # (rows, q_max)
        everywhere = valid[None, :, None].expand(key_heads, -1, groups, -1)
        if len({self.prefix_lens[s] for s in members}) == 1:
            prefix_len = prefix_len[:1]
        if window is not None:
            query = torch.minimum(query, q_len - 1)  # padding must see a key: softmax over nothing is NaN
        distance = (prefix_len + query)[:, :, None] - key[:, None]  # (rows or 1, q_max, k_max)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, float("-inf"))
        return Chunk(
            rows=len(members),
            q_max=q_max,
            k_max=k_max,
            q_index=q_index,
            k_index=k_index,
            kept=everywhere.flatten().nonzero()[:, 0],
            valid=valid[:, None, :, None].float(),
            mask=mask[:, None],
        )


@dataclass(frozen=True)
class PrefillPlan(PackedPlan):
    """A `PackedPlan` that keeps the keys and values of every layer: the first half of decoding."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    """Layer index -> keys (K, L, D) and values (K, L, D), rotary embedding applied."""


class DecodePlan:
    """A KV cache for up to `max_rows` rows, and the description of one decoding step.

    Row b's keys lie in slots 0 .. length of a (B, K, T, D) buffer for each layer, so rows of any length stand
    side by side. T grows in blocks as sequences do. Rows are always dense: `move` fills the holes of rows
    that ended.
    """

    def __init__(self, max_rows: int, *, block: int = 64) -> None:
        self.max_rows = max_rows
        self.block = block
        self.slots = 0  # T
        self.span = 0  # slots that this step looks at
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._masks: dict[int | None, Tensor] = {}
        self._slot_index: dict[int, Tensor] = {}

    def reserve(self, slots: int) -> None:
        """Make room for sequences of `slots` tokens, rounded up to a block; what is cached stays."""
        if slots <= self.slots:
            return
        self.slots = -(-max(slots, self.slots + self.slots // 2) // self.block) * self.block
        for cache in (self.keys, self.values):
            for layer, old in cache.items():
                new = old.new_zeros(*old.shape[:2], self.slots, old.shape[3])
                new[:, :, : old.shape[2]] = old
                cache[layer] = new

    def admit(
        self,
        rows: Tensor,  # (R,) int64
        positions: Tensor,  # (R, P) int64 into the prefill's L; padding may be any valid position
        prefill: PrefillPlan,
    ) -> None:
        """Copy the keys and values at `positions` of a prefill to the slots 0 .. P-1 of `rows`."""
        count, width = positions.shape
        self.reserve(width + 1)
        for layer, pair in prefill.kept.items():
            for cache, source in zip((self.keys, self.values), pair, strict=True):
                heads, _, dim = source.shape
                if layer not in cache:
                    # zeros, not empty: a masked slot still meets its value as 0 · value, and 0 · NaN is NaN
                    cache[layer] = source.new_zeros(self.max_rows, heads, self.slots, dim)
                taken = source.index_select(1, positions.flatten()).view(heads, count, width, dim)
                cache[layer][:, :, :width].index_copy_(0, rows, taken.transpose(0, 1))

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole rows `sources` (R,) onto rows `targets` (R,)."""
        for cache in (self.keys, self.values):
            for buffer in cache.values():
                used = buffer[:, :, : self.span]
                used.index_copy_(0, targets, used.index_select(0, sources))

    def begin(self, lengths: Tensor, span: int) -> None:
        """Describe the next step: row b appends a token at slot `lengths[b]`; `span` is the largest of them +
        1.

        `lengths` (B,) int64 lies on the model's device; `span` is known to the host, so nothing synchronises.
        """
        self.reserve(span)
        self.span = span
        self._lengths = lengths
        self._masks.clear()
        self._slot_index.clear()

    def mask(self, window: int | None) -> Tensor:
        """(B, 1, span) float32: 0 for the slots a row may look at, -inf for the others."""
        if window is not None and window >= self.span:
            window = None
        if window not in self._masks:
            slot = torch.arange(self.span, device=self._lengths.device)
            length = self._lengths[:, None]
            hidden = slot > length
            if window is not None:
                hidden |= slot <= length - window
            mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask[:, None]
        return self._masks[window]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values (B, K, 1, D); returns all slots in use, (B, K, span, D)."""
        rows, heads = key.shape[:2]
        if heads not in self._slot_index:
            row = torch.arange(rows * heads, device=key.device).view(rows, heads) * self.slots
            self._slot_index[heads] = (row + self._lengths[:, None]).flatten()
        index = self._slot_index[heads]
        for cache, new in ((self.keys, key), (self.values, value)):
            buffer = cache[layer]
            buffer.view(-1, new.shape[-1]).index_copy_(0, index, new.reshape(-1, new.shape[-1]))
        return self.keys[layer][:rows, :, : self.span], self.values[layer][:rows, :, : self.span]
