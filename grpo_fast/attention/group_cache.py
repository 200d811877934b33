"""A dense KV cache of groups: every prompt once, own tokens row by row on one clock.

All rows write at the same slot, the clock's, so appending is one strided copy whatever the rows' lengths; a row sees
the slots since it was born. Scores against the shared prompt and against the own keys lie side by side under one
softmax, which is the exact merge of the two parts.

Letters: B rows, P prompts stored, H query heads, K key heads, G = H / K, D head width, N rows of a prompt, S slots of
own keys in sight, T slots held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fast.attention.decode import DecodePlan
from grpo_fast.attention.plan import PrefillPlan

BLOCK = 32
"""Slots by which the own keys grow at least."""


class GroupCache(DecodePlan):
    """Prompts in (P, K, longest, D) and own tokens in (B, K, T, D) for every layer; both grow as needed."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self.device = device
        self.prompts: list[int] = []  # names, by slot
        self.lengths: list[int] = []  # (P,) tokens of each prompt
        self.slot_of: list[int] = []  # (B,) place of each row's prompt
        self.born: list[int] = []  # (B,) slot of each row's first own token
        self.now = -1  # the slot written last
        self.held = 0  # T
        self.prompt_keys: dict[int, Tensor] = {}
        self.prompt_values: dict[int, Tensor] = {}
        self.own_keys: dict[int, Tensor] = {}
        self.own_values: dict[int, Tensor] = {}
        self._widest = 0  # N
        self._identity: list[int] = []  # what the grid is when every prompt has its one row in order
        self._grid: list[int] = []  # (P·N,) row at each place
        self._places: list[int] = []  # (B,) place of each row
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor | None] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        caches = (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values)
        return sum(buffer.nbytes for cache in caches for buffer in cache.values())

    def room_for(self, lengths: Sequence[int], rows: int) -> bool:
        """Always: it grows."""
        return True

    def store(self, prompts: Sequence[int], prefill: PrefillPlan) -> None:
        """Copy the prompts' keys and values out of the prefill, padded to the longest."""
        first = len(self.prompts)
        self.prompts.extend(prompts)
        self.lengths.extend(prefill.q_lens)
        width = max(self.lengths)
        longest = max(prefill.q_lens)
        start = torch.tensor(prefill.q_starts[:-1])[:, None]
        length = torch.tensor(prefill.q_lens)[:, None]
        index = (start + torch.minimum(torch.arange(longest), length - 1)).flatten().to(self.device)
        for layer, pair in prefill.kept.items():
            for cache, source in zip((self.prompt_keys, self.prompt_values), pair, strict=True):
                heads, _, dim = source.shape
                buffer = _grown(cache.get(layer), (len(self.prompts), heads, width, dim), source)
                taken = source.index_select(1, index).view(heads, len(prompts), longest, dim)
                buffer[first : len(self.prompts), :, :longest] = taken.transpose(0, 1)
                cache[layer] = buffer
            for cache, source in zip((self.own_keys, self.own_values), pair, strict=True):
                if layer not in cache:
                    # zeros, not empty: a masked slot still meets its value as 0 · value, and 0 · NaN is NaN
                    cache[layer] = source.new_zeros(
                        self.max_rows, source.shape[0], self.held, source.shape[2]
                    )

    def add(self, prompts: Sequence[int]) -> None:
        """Rows are born at the next slot."""
        if not self.slot_of:
            self.now = -1
        place = {prompt: slot for slot, prompt in enumerate(self.prompts)}
        self.slot_of.extend(place[prompt] for prompt in prompts)
        self.born.extend([self.now + 1] * len(prompts))
        self._regroup()

    def keep(self, count: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Moved rows bring the slots they see along."""
        buffers = [x for cache in (self.own_keys, self.own_values) for x in cache.values()]
        for source, target in zip(sources, targets, strict=True):
            span = slice(self.born[source], self.now + 1)
            for buffer in buffers:
                buffer[target, :, span] = buffer[source, :, span]
        for source, target in zip(sources, targets, strict=True):
            self.slot_of[target], self.born[target] = self.slot_of[source], self.born[source]
        del self.slot_of[count:], self.born[count:]
        self._regroup()

    def drop(self, prompt: int) -> None:
        """The last prompt takes the place of the one that goes."""
        slot, last = self.prompts.index(prompt), len(self.prompts) - 1
        if slot != last:
            width = self.lengths[last]
            for cache in (self.prompt_keys, self.prompt_values):
                for buffer in cache.values():
                    buffer[slot, :, :width] = buffer[last, :, :width]
            self.prompts[slot], self.lengths[slot] = self.prompts[last], self.lengths[last]
            self.slot_of = [slot if place == last else place for place in self.slot_of]
        self.prompts.pop()
        self.lengths.pop()
        self._regroup()

    def _regroup(self) -> None:
        """Places of the rows in a rectangle of prompts × rows; rows that fill it in part leave holes."""
        self._orders.clear()
        self._masks.clear()
        members: list[list[int]] = [[] for _ in self.prompts]
        for row, slot in enumerate(self.slot_of):
            members[slot].append(row)
        self._widest = max(map(len, members), default=0)
        self._grid = [row for rows in members for row in (rows + [0] * self._widest)[: self._widest]]
        self._places = [0] * len(self.slot_of)
        self._identity = list(range(len(members))) if self._widest == 1 else []
        for slot, rows in enumerate(members):
            for column, row in enumerate(rows):
                self._places[row] = slot * self._widest + column

    def _order(self, key_heads: int) -> tuple[Tensor | None, Tensor | None]:
        """Of the vectors (row, key head) in the order (prompt, key head, row of the prompt), and the way back.

        None and None where that is the order they are in: one row a prompt.
        """
        if self._grid == self._identity:
            return None, None
        if key_heads not in self._orders:
            head = torch.arange(key_heads)
            grid = torch.tensor(self._grid).view(len(self.prompts), 1, -1) * key_heads + head[:, None]
            places = torch.tensor(self._places)[:, None]
            slot, column = places // self._widest, places % self._widest
            back = (slot * key_heads + head) * self._widest + column
            self._orders[key_heads] = grid.flatten().to(self.device), back.flatten().to(self.device)
        return self._orders[key_heads]

    def begin(self, rows: int, own: Tensor) -> None:
        """The clock goes on by one slot; when it meets the end, what is in sight moves to the front or T grows."""
        self.now += 1
        if self.now < self.held:
            if any(window is not None for window in self._masks):
                self._masks.clear()  # what a window hides moves with the clock
            return
        self._masks.clear()
        oldest = min(self.born)
        live = self.now - oldest
        if 2 * live > self.held or not self.held:
            self.held = max(self.held + BLOCK, self.held * 3 // 2)
        for cache in (self.own_keys, self.own_values):
            for layer, old in cache.items():
                new = old
                if old.shape[2] != self.held:
                    new = old.new_zeros(*old.shape[:2], self.held, old.shape[3])
                new[:, :, :live] = old[:, :, oldest : self.now]  # onto itself only where the halves are apart
                cache[layer] = new
        self.now = live
        self.born = [born - oldest for born in self.born]

    def attend(
        self,
        query: Tensor,  # (B, H, 1, D)
        key: Tensor,  # (B, K, 1, D)
        value: Tensor,  # (B, K, 1, Dv)
        layer: int,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # (B, 1, H, Dv)
        """Two products for the scores, one softmax, two products for the values, all in float32."""
        rows, heads, _, dim = query.shape
        key_heads = key.shape[1]
        first, last, shared = min(self.born), self.now + 1, max(self.lengths)
        for cache, new in ((self.own_keys, key), (self.own_values, value)):
            cache[layer][:rows, :, self.now] = new[:, :, 0]
        own_keys = self.own_keys[layer][:rows, :, first:last].float()
        own_values = self.own_values[layer][:rows, :, first:last].float()
        prompt_keys = self.prompt_keys[layer][: len(self.prompts), :, :shared].float()
        prompt_values = self.prompt_values[layer][: len(self.prompts), :, :shared].float()

        order, back = self._order(key_heads)
        places = len(self._grid) * key_heads
        together = (len(self.prompts), key_heads, -1)  # rows of a prompt, each with its G heads

        q = query.reshape(rows * key_heads, -1).float() * scale
        spread = _picked(q, order).view(*together, dim)  # (P, K, N·G, D)
        q = q.view(rows, key_heads, -1, dim)
        scores = _picked(torch.matmul(spread, prompt_keys.mT).view(places, -1), back)
        scores = torch.cat([scores.view(rows, key_heads, -1, shared), torch.matmul(q, own_keys.mT)], -1)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        mask = self._mask(window)
        p = (scores if mask is None else scores.add_(mask)).softmax(-1)  # (B, K, G, longest + S)
        out = torch.matmul(p[..., shared:], own_values)
        p = _picked(p[..., :shared].reshape(rows * key_heads, -1), order).view(*together, shared)
        mixed = _picked(torch.matmul(p, prompt_values).view(places, -1), back)
        return (out + mixed.view(out.shape)).view(rows, 1, heads, -1).to(query.dtype)

    def _mask(self, window: int | None) -> Tensor | None:
        """(B, 1, 1, longest + S) float32: 0 where a row may look and -inf elsewhere; None: it may look everywhere.

        Without a window it is made once for all slots held: those not written yet are seen by every row.
        """
        first, shared = min(self.born), max(self.lengths)
        if window is not None and window >= shared + self.now - first + 1:
            window = None
        if window not in self._masks:
            mask = None
            if window is not None or max(self.born) > first or min(self.lengths) < shared:
                born = torch.tensor(self.born, device=self.device)[:, None]
                lengths = [self.lengths[slot] for slot in self.slot_of]
                length = torch.tensor(lengths, device=self.device)[:, None]
                place = torch.arange(shared, device=self.device)
                slot = torch.arange(first, self.held, device=self.device)
                hidden = torch.cat([place >= length, slot < born], 1)
                if window is not None:
                    ago = torch.cat(
                        [length + self.now - born - place, (self.now - slot).expand(len(born), -1)], 1
                    )
                    hidden |= ago >= window
                mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask
        mask = self._masks[window]
        return None if mask is None else mask[:, None, None, : shared + self.now + 1 - first]


def _picked(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _grown(old: Tensor | None, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """`old` with room for at least `shape`; what it holds stays, the rest is zero."""
    if old is not None and old.shape[0] >= shape[0] and old.shape[2] >= shape[2]:
        return old
    if old is None:
        return like.new_zeros(shape)
    new = like.new_zeros(max(shape[0], old.shape[0]), shape[1], max(shape[2], old.shape[2]), shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
