"""Sequences of all lengths side by side in rows of at most `token_budget` tokens, each shared prompt once.

Letters: L positions of a row, S sequences in it, N completion tokens in it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fast.attention.plan import PackedPlan
from grpo_fast.typed import integers


@dataclass(frozen=True)
class PackedBatch:
    """One row of packed sequences: what the model, the loss head and the loss need."""

    input_ids: Tensor
    """(1, L) int64"""
    position_ids: Tensor
    """(1, L) int64: counted from the start of each sequence's prompt"""
    plan: PackedPlan
    """Goes to the model as `plan=`"""
    hidden_index: Tensor
    """(N,) int64: position in L whose hidden state predicts target n"""
    targets: Tensor
    """(N,) int64: the completion tokens"""
    cu_seqlens: Tensor
    """(S+1,) int32: where each completion starts and ends in N"""
    last_index: Tensor | None
    """(S,) int64: position in L of each sequence's last token; None unless packed with keep_last=True"""
    sequence_index: Tensor
    """(S,) int64: which of the completions given to `pack` these are"""
    counts: bool = True
    """False for one that only keeps a process in step with the others: nothing of it is added to the loss"""

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, plan=self.plan.to(device), **moved)

    def gather(self, per_sequence: Sequence[Tensor]) -> Tensor:
        """(N,) values of this batch in its own order, from one tensor per completion given to `pack`.

        Raises `ValueError` when a tensor is not as long as its completion.
        """
        indices, lengths = integers(self.sequence_index), integers(self.cu_seqlens.diff())
        chosen = [per_sequence[i] for i in indices]
        for index, values, length in zip(indices, chosen, lengths, strict=True):
            if values.shape != (length,):
                raise ValueError(
                    f"per_sequence[{index}] must have shape ({length},), got {tuple(values.shape)}"
                )
        return torch.cat(chosen).to(self.targets.device)


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    prompt_of: Sequence[int] | None = None,
    token_budget: int,
    share_prefix: bool = True,
    keep_last: bool = False,
    together: Sequence[int] | None = None,
) -> list[PackedBatch]:
    """Distribute sequences over rows of at most `token_budget` tokens, on the CPU.

    `prompt_of[i]` is the index of completion i's prompt (default i). With `share_prefix`, the completions of
    one prompt stay together as far as they fit and their row holds the prompt once: `[prompt | c1 | ... |
    cG]`. A completion's last token predicts nothing and is left out of the input unless `keep_last`, which
    reward models need. Completions with the same number in `together` (the replies of a comparison) land in the same
    row. A sequence, or such a bundle, longer than the budget gets a row of its own. Rows are filled longest
    first, each time into the row it fills best; the result depends on nothing but the arguments. Each
    completion lands in exactly one row.

    Raises `ValueError` for an empty prompt, a prompt index out of range or a budget below 1.
    """
    owner = list(range(len(completions))) if prompt_of is None else list(prompt_of)
    _check(prompts, completions, owner, token_budget)
    dropped = 0 if keep_last else 1
    sizes = [max(len(c) - dropped, 0) for c in completions]
    if together is None:
        units = _units(prompts, owner, sizes, token_budget, share_prefix)
        bundles = [(cost, [unit]) for cost, unit in units]
    else:
        bundles = _bundles(prompts, owner, sizes, together)
    rows: list[list[list[int]]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for cost, bundle in bundles:
        slot = bisect_left(free, (cost, -1))
        if slot < len(free):
            left, row = free.pop(slot)
        else:
            left, row = max(token_budget, cost), len(rows)
            rows.append([])
        rows[row].extend(bundle)
        insort(free, (left - cost, row))
    return [_layout(prompts, completions, owner, sizes, row, keep_last) for row in rows]


def pack_chosen(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    chosen: Sequence[int],
    *,
    prompt_of: Sequence[int],
    token_budget: int,
    share_prefix: bool = True,
    together: Sequence[int] | None = None,
) -> list[PackedBatch]:
    """`pack` for some of the completions; `sequence_index` counts among all of them."""
    if not chosen:
        return []
    batches = pack(
        prompts,
        [completions[i] for i in chosen],
        prompt_of=[prompt_of[i] for i in chosen],
        token_budget=token_budget,
        share_prefix=share_prefix,
        together=None if together is None else [together[i] for i in chosen],
    )
    places = torch.tensor(list(chosen))
    return [replace(batch, sequence_index=places[batch.sequence_index]) for batch in batches]


def _check(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    owner: list[int],
    token_budget: int,
) -> None:
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    if len(owner) != len(completions):
        raise ValueError(
            f"prompt_of must have one entry for each of {len(completions)} completions, got {len(owner)}"
        )
    for i, p in enumerate(owner):
        if not 0 <= p < len(prompts):
            raise ValueError(f"completion {i} names prompt {p}, but there are {len(prompts)} prompts")
        if not len(prompts[p]):
            raise ValueError(
                f"prompt {p} is empty: a completion's first token needs a token to be predicted from"
            )


def _units(
    prompts: Sequence[Sequence[int]],
    owner: list[int],
    sizes: list[int],
    token_budget: int,
    share_prefix: bool,
) -> list[tuple[int, list[int]]]:
    """(tokens, completions that share one prompt), the largest first."""
    units: list[tuple[int, list[int]]] = []
    if not share_prefix:
        units = [(len(prompts[p]) + sizes[i], [i]) for i, p in enumerate(owner)]
    else:
        groups: dict[int, list[int]] = {}
        for i, p in enumerate(owner):
            groups.setdefault(p, []).append(i)
        for p, members in groups.items():
            cost = len(prompts[p])
            unit: list[int] = []
            if cost + sum(sizes[i] for i in members) > token_budget:
                members.sort(key=lambda i: -sizes[i])
            for i in members:
                if unit and cost + sizes[i] > token_budget:
                    units.append((cost, unit))
                    cost, unit = len(prompts[p]), []
                unit.append(i)
                cost += sizes[i]
            units.append((cost, unit))
    units.sort(key=lambda u: (-u[0], u[1]))
    return units


def _bundles(
    prompts: Sequence[Sequence[int]], owner: list[int], sizes: list[int], together: Sequence[int]
) -> list[tuple[int, list[list[int]]]]:
    """(tokens, completions prompt by prompt) of everything that belongs together, the largest first."""
    members: dict[int, dict[int, list[int]]] = {}
    for i, bundle in enumerate(together):
        members.setdefault(bundle, {}).setdefault(owner[i], []).append(i)
    bundles = [
        (sum(len(prompts[p]) + sum(sizes[i] for i in unit) for p, unit in by_prompt.items()), by_prompt)
        for by_prompt in members.values()
    ]
    bundles.sort(key=lambda b: (-b[0], next(iter(b[1].values()))))
    return [(cost, list(by_prompt.values())) for cost, by_prompt in bundles]


def _layout(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    owner: list[int],
    sizes: list[int],
    units: list[list[int]],
    keep_last: bool,
) -> PackedBatch:
    """One row as tensors."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int, int]] = []  # (length, prefix start, prefix length)
    hidden: list[int] = []
    targets: list[int] = []
    ends = [0]
    last: list[int] = []
    for unit in units:
        prompt = prompts[owner[unit[0]]]
        first, width = len(ids), len(prompt)
        ids.extend(prompt)
        positions.extend(range(width))
        if len(unit) > 1:
            segments.append((width, 0, 0))
        for i in unit:
            start, size = len(ids), sizes[i]
            ids.extend(completions[i][:size])
            positions.extend(range(width, width + size))
            if len(unit) == 1:
                segments.append((width + size, 0, 0))
            elif size:
                segments.append((size, first, width))
            if completions[i]:
                hidden.append(first + width - 1)
                hidden.extend(range(start, start + len(completions[i]) - 1))
            targets.extend(completions[i])
            ends.append(len(targets))
            last.append(start + size - 1 if size else first + width - 1)
    lengths, starts, shared = zip(*segments, strict=True)
    return PackedBatch(
        input_ids=torch.tensor([ids], dtype=torch.int64),
        position_ids=torch.tensor([positions], dtype=torch.int64),
        plan=PackedPlan(lengths, starts, shared),
        hidden_index=torch.tensor(hidden, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        last_index=torch.tensor(last, dtype=torch.int64) if keep_last else None,
        sequence_index=torch.tensor([i for unit in units for i in unit], dtype=torch.int64),
    )
