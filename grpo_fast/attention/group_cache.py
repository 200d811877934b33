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
        self._masks: dict[int | None, Tensor | None] = {}
        self._grid: Tensor | None = None
        self._places: Tensor | None = None

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
        """Moved rows bring the slots in sight along."""
        if sources:
            span = slice(min(self.born), self.now + 1)
            index, into = (torch.tensor(rows, device=self.device) for rows in (sources, targets))
            for cache in (self.own_keys, self.own_values):
                for buffer in cache.values():
                    used = buffer[:, :, span]
                    used.index_copy_(0, into, used.index_select(0, index))
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
        """Places of the rows in a rectangle of prompts × rows; none is needed when the rows fill it in order."""
        self._grid = self._places = None
        if not self.slot_of:
            return
        members: list[list[int]] = [[] for _ in self.prompts]
        for row, slot in enumerate(self.slot_of):
            members[slot].append(row)
        widest = max(map(len, members))
        grid = [row for rows in members for row in (rows + [0] * widest)[:widest]]
        if grid == list(range(len(self.slot_of))):
            return
        places = [0] * len(self.slot_of)
        for slot, rows in enumerate(members):
            for column, row in enumerate(rows):
                places[row] = slot * widest + column
        self._grid, self._places = (torch.tensor(index, device=self.device) for index in (grid, places))

    def begin(self, rows: int, own: Tensor) -> None:
        """The clock goes on by one slot; when it meets the end, what is in sight moves to the front or T grows."""
        self._masks.clear()
        self.now += 1
        if self.now < self.held:
            return
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

        q = query.reshape(rows, key_heads, heads // key_heads, dim).float() * scale
        with_prompts = self._collected(torch.matmul(self._spread(q), prompt_keys.mT), rows)
        scores = torch.cat([with_prompts, torch.matmul(q, own_keys.mT)], -1)  # (B, K, G, longest + S)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        mask = self._mask(window)
        p = (scores if mask is None else scores.add_(mask)).softmax(-1)
        out = torch.matmul(p[..., shared:], own_values)
        out += self._collected(torch.matmul(self._spread(p[..., :shared]), prompt_values), rows)
        return out.view(rows, 1, heads, -1).to(query.dtype)

    def _spread(self, x: Tensor) -> Tensor:
        """(B, K, G, E) -> (P, K, N·G, E): the rows of a prompt together."""
        if self._grid is not None:
            x = x.index_select(0, self._grid)
        x = x.view(len(self.prompts), -1, *x.shape[1:])
        return x.transpose(1, 2).flatten(2, 3)

    def _collected(self, x: Tensor, rows: int) -> Tensor:
        """(P, K, N·G, E) -> (B, K, G, E), the way back."""
        count = rows if self._grid is None else len(self._grid)
        x = x.unflatten(2, (count // len(self.prompts), -1)).transpose(1, 2).flatten(0, 1)
        return x if self._places is None else x.index_select(0, self._places)

    def _mask(self, window: int | None) -> Tensor | None:
        """(B, 1, 1, longest + S) float32: 0 where a row may look and -inf elsewhere; None: it may look everywhere."""
        first, shared = min(self.born), max(self.lengths)
        if window is not None and window >= shared + self.now - first + 1:
            window = None
        if window in self._masks:
            return self._masks[window]
        mask = None
        if window is not None or max(self.born) > first or min(self.lengths) < shared:
            born = torch.tensor(self.born, device=self.device)[:, None]
            length = torch.tensor([self.lengths[slot] for slot in self.slot_of], device=self.device)[:, None]
            place = torch.arange(shared, device=self.device)
            slot = torch.arange(first, self.now + 1, device=self.device)
            hidden = torch.cat([place >= length, slot < born], 1)
            if window is not None:
                distance = torch.cat(
                    [length + self.now - born - place, (self.now - slot).expand(len(born), -1)], 1
                )
                hidden |= distance >= window
            mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, float("-inf"))[
                :, None, None
            ]
        self._masks[window] = mask
        return mask


def _grown(old: Tensor | None, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """`old` with room for at least `shape`; what it holds stays, the rest is zero."""
    if old is not None and old.shape[0] >= shape[0] and old.shape[2] >= shape[2]:
        return old
    if old is None:
        return like.new_zeros(shape)
    new = like.new_zeros(max(shape[0], old.shape[0]), shape[1], max(shape[2], old.shape[2]), shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
