"""DAPO's soft punishment of length (arXiv 2503.14476, section 3.4), as an objective of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLONG = "overlong"
"""Name of the objective."""


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """0 for completions of up to `limit - buffer` tokens, then falling linearly to -1 at `limit`."""

    limit: int
    """Longest completion, in tokens"""
    buffer: int
    """Tokens before the limit over which the reward falls"""

    def __call__(self, lengths: Sequence[int]) -> Tensor:
        """(S, 1) float32 rewards of completions of these lengths (tokens)."""
        over = torch.tensor(lengths, dtype=torch.float32) - (self.limit - self.buffer)
        return (-over / self.buffer).clamp(-1.0, 0.0)[:, None] + 0.0  # no -0.0
