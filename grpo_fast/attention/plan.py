"""What attention needs to know about one forward pass: who attends to whom, and where the keys are.

A plan travels from `model.base_model(..., plan=plan)` through the model's keyword arguments to every layer's
attention. `PackedPlan` describes sequences laid side by side, and `PrefillPlan` also keeps the keys and values it
meets; the plan of decoding is in `decode.py`.

Letters: L packed positions, S segments, H query heads, K key heads, G = H / K, D head width.
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
