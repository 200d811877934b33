"""A KV cache in pages: the prompt's shared by its group, freed pages used again at once, every buffer fixed.

Which page belongs to whom is decided on the host when a row is added; from then on a step only reads the table, so it
can be captured in a CUDA graph. Page 0 is where padding rows write; nobody reads it.

Letters as in `paged.py`; R rows at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fast.attention.decode import DecodePlan
from grpo_fast.attention.paged import FP8, PAGE, Pages, paged_attention, quantized
from grpo_fast.attention.plan import PrefillPlan


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


class PagedCache(DecodePlan):
    """Pages for up to `max_rows` rows of `max_new_tokens` on prompts of up to `max_prompt` tokens.

    There are pages for every row's longest completion and for `prompts` longest prompts; `fp8` stores float8_e4m3fn
    with a scale for each token and head.
    """

    def __init__(
        self,
        max_rows: int,
        device: torch.device,
        *,
        max_prompt: int,
        max_new_tokens: int,
        prompts: int,
        fp8: bool = False,
    ) -> None:
        self.max_prompt, self.max_new_tokens = max_prompt, max_new_tokens
        self.fp8 = fp8
        self.device = device
        self.own_pages = pages_of(max_new_tokens)
        self.count = 1 + max_rows * self.own_pages + prompts * pages_of(max_prompt)
        self.free = list(range(self.count - 1, 0, -1))
        self.prompt_pages: dict[int, list[int]] = {}
        self.length_of: dict[int, int] = {}
        self.pages_of_row: list[list[int]] = []
        width = pages_of(max_prompt) + self.own_pages
        self.table = torch.zeros(max_rows, width, dtype=torch.int32, device=device)  # (R, W)
        self.prompt_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)  # (R,); 0: padding
        self.own_lens = torch.ones(max_rows, dtype=torch.int32, device=device)  # (R,)
        self.caches: dict[int, tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = {}
        self.rows = 0
        self._cell = torch.zeros(0, dtype=torch.int64, device=device)
        self._page = self._cell
        self._lines: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and scales, used or not."""
        return sum(x.nbytes for layer in self.caches.values() for x in layer if x is not None)

    def room_for(self, lengths: Sequence[int], rows: int) -> bool:
        """Whether that many pages are free."""
        return sum(map(pages_of, lengths)) + rows * self.own_pages <= len(self.free)

    def store(self, prompts: Sequence[int], prefill: PrefillPlan) -> None:
        """Copy the prompts' keys and values into fresh pages."""
        page, cell = [], []
        for prompt, length in zip(prompts, prefill.q_lens, strict=True):
            taken = [self.free.pop() for _ in range(pages_of(length))]
            self.prompt_pages[prompt], self.length_of[prompt] = taken, length
            page.extend(taken[i // PAGE] for i in range(length))
            cell.extend(i % PAGE for i in range(length))
        at, inside = (torch.tensor(index, device=self.device) for index in (page, cell))
        lines: dict[int, Tensor] = {}
        for layer, (key, value) in prefill.kept.items():  # (K, L, D)
            heads = len(key)
            if heads not in lines:
                head = torch.arange(heads, device=self.device)[:, None]
                lines[heads] = ((at * heads + head) * PAGE + inside).flatten()
            if layer not in self.caches:
                self.caches[layer] = (
                    self._made(key),
                    self._made(value),
                    self._scales(heads),
                    self._scales(heads),
                )
            self._write(layer, lines[heads], key.flatten(0, 1), value.flatten(0, 1))

    def _made(self, like: Tensor) -> Tensor:
        # zeros, not empty: a cell never written still meets its weight as 0 · value, and 0 · NaN is NaN
        shape = (self.count, len(like), PAGE, like.shape[-1])
        return like.new_zeros(shape, dtype=torch.uint8).view(FP8) if self.fp8 else like.new_zeros(shape)

    def _scales(self, heads: int) -> Tensor | None:
        return torch.zeros(self.count, heads, PAGE, device=self.device) if self.fp8 else None

    def _write(self, layer: int, lines: Tensor, key: Tensor, value: Tensor) -> None:
        """Vectors (n, D) to the lines (n,) of the flattened pages."""
        keys, values, *scales = self.caches[layer]
        for cache, scale, new in zip((keys, values), scales, (key, value), strict=True):
            if scale is not None:
                new, factors = quantized(new)
                scale.view(-1).index_copy_(0, lines, factors)
                cache, new = cache.view(torch.uint8), new.view(torch.uint8)
            cache.view(-1, new.shape[-1]).index_copy_(0, lines, new)

    def add(self, prompts: Sequence[int]) -> None:
        """Own pages for the new rows, after the prompt's in their tables."""
        first = len(self.pages_of_row)
        tables = torch.zeros(len(prompts), self.table.shape[1], dtype=torch.int32)
        for i, prompt in enumerate(prompts):
            own = [self.free.pop() for _ in range(self.own_pages)]
            self.pages_of_row.append(own)
            listed = self.prompt_pages[prompt] + own
            tables[i, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
        rows = slice(first, len(self.pages_of_row))
        self.table[rows] = tables.to(self.device)
        lengths = [self.length_of[prompt] for prompt in prompts]
        self.prompt_lens[rows] = torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def keep(self, count: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Only tables move; the places left become padding."""
        before = len(self.pages_of_row)
        gone = set(range(before)) - set(range(count)) - set(sources) | set(targets)
        for row in gone:
            self.free.extend(self.pages_of_row[row])
        if sources:
            index, into = (torch.tensor(rows, device=self.device) for rows in (sources, targets))
            for state in (self.table, self.prompt_lens):
                state[into] = state[index]
        for source, target in zip(sources, targets, strict=True):
            self.pages_of_row[target] = self.pages_of_row[source]
        del self.pages_of_row[count:]
        self.table[count:before] = 0
        self.prompt_lens[count:before] = 0

    def drop(self, prompt: int) -> None:
        """Its pages are free."""
        self.free.extend(self.prompt_pages.pop(prompt))
        del self.length_of[prompt]

    def begin(self, rows: int, own: Tensor) -> None:
        """Where each row's new keys go: page and cell; padding rows see one token, in page 0."""
        self.rows = rows
        prompt = self.prompt_lens[:rows].long()
        own = torch.where(prompt > 0, own, 1)
        self.own_lens[:rows] = own
        slot = prompt + (-prompt % PAGE) + own - 1
        self._page = self.table[:rows].gather(1, (slot // PAGE)[:, None])  # (B, 1)
        self._cell = (slot % PAGE)[:, None]
        self._lines.clear()

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
        """Append and attend, by the kernel where there is one."""
        heads = key.shape[1]
        if heads not in self._lines:
            head = torch.arange(heads, device=self.device)
            self._lines[heads] = ((self._page * heads + head) * PAGE + self._cell).flatten()
        self._write(layer, self._lines[heads], key.flatten(0, 2), value.flatten(0, 2))
        pages = Pages(
            *self.caches[layer],
            self.table[: self.rows],
            self.prompt_lens[: self.rows],
            self.own_lens[: self.rows],
        )
        out = paged_attention(query[:, :, 0], pages, scale=scale, window=window, softcap=softcap)
        return out[:, None]

    def clear(self) -> None:
        """No prompts and no rows; the pages stay allocated."""
        self.free = list(range(self.count - 1, 0, -1))
        self.prompt_pages.clear()
        self.length_of.clear()
        self.pages_of_row.clear()
        self.table.zero_()
        self.prompt_lens.zero_()
