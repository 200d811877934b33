"""How much of what a policy says it has said before, in a group and in one completion; counted on token ids."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 4
"""Tokens of the pieces that are compared within a completion."""


def repeated(completions: Sequence[Sequence[int]], group_size: int) -> dict[str, float]:
    """`duplicate_frac` and `repetition` of a step's completions, group after group.

    `duplicate_frac`: share of completions that say, token for token, what an earlier one of their group said.
    `repetition`: share of all 4-grams that occurred earlier in the same completion (1 - distinct-4 of Li et al.,
    arXiv 1510.03055, each completion by itself); a completion that goes round in a loop comes near 1.
    """
    groups = [completions[first : first + group_size] for first in range(0, len(completions), group_size)]
    distinct = sum(len({tuple(completion) for completion in group}) for group in groups)
    pieces = sum(max(0, len(completion) - NGRAM + 1) for completion in completions)
    new = sum(
        len(set(zip(*(completion[start:] for start in range(NGRAM)), strict=False)))
        for completion in completions
    )
    return {
        "duplicate_frac": 1 - distinct / len(completions) if completions else 0.0,
        "repetition": 1 - new / pieces if pieces else 0.0,
    }
