"""Decoding: the plan of a forward pass of one new token for each of B rows, and what every key-value cache offers.

Rows are completions under way. Those of a group share their prompt, whose keys and values are stored once; a row
holds only what it generated itself. `group_cache.py` is dense and works anywhere, `paged_cache.py` is made of pages
and fixed buffers for CUDA.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from grpo_fast.attention.plan import PrefillPlan


class DecodePlan(ABC):
    """A KV cache of prompts and rows; the rows in use are always the first ones.

    A forward pass with this plan gives every row one new token: `begin`, then `attend` once a layer.
    """

    @abstractmethod
    def room_for(self, lengths: Sequence[int], rows: int) -> bool:
        """Whether more prompts of these lengths and `rows` more rows fit in."""

    @abstractmethod
    def store(self, prompts: Sequence[int], prefill: PrefillPlan) -> None:
        """Keep the prompts of a prefill, named `prompts` in its order."""

    @abstractmethod
    def add(self, prompts: Sequence[int]) -> None:
        """One more row for each entry, after the rows in use, on the stored prompt of that name."""

    @abstractmethod
    def keep(self, count: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Rows `sources` take the places `targets`; only the first `count` rows go on."""

    @abstractmethod
    def drop(self, prompt: int) -> None:
        """Forget a prompt that no row uses."""

    @abstractmethod
    def begin(self, rows: int, own: Tensor) -> None:
        """Describe the next forward pass: its number of rows and `own` (rows,), how many tokens each has drawn.

        The last one drawn is the pass's input, so `own` is also the number of own keys a row then sees.
        """

    @abstractmethod
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
        """Store the new keys and values of one layer and attend to all that each row may see."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of their scales."""
