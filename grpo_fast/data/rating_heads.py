"""The heads of several sources: their new names, and one kind and one scale for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import cast

from grpo_fast.data.rated import HeadSpec, Kind, RatedExample, listed, quoted, shown
from grpo_fast.data.records import one_line
from grpo_fast.data.schemas import Table
from grpo_fast.errors import UserError, did_you_mean

RANGE_RATIO = 3.0  # two unscaled sources whose ranges differ by more are taken to be on different scales


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one source gave. `observed`: a head's labels, or the margins of its pairs."""

    name: str
    guessed: bool
    """Whether the kinds come from the values (format columns), not from a schema."""
    heads: dict[str, HeadSpec]
    old_names: dict[str, str]
    """What the source itself calls each head."""
    examples: list[RatedExample]
    observed: dict[str, list[float]]


def renamed(found: list[tuple[Table, list[RatedExample]]], rename: Mapping[str, str]) -> list[Source]:
    for key, new in rename.items():
        if new and not (new.strip() and new.isprintable()):
            raise UserError(f"--data.rename: {shown(new)}, the new name of {shown(key)}, must be printable")
    unknown, known = dict.fromkeys(rename), []
    read = []
    for table, examples in found:
        names = {}
        for head in table.heads:
            keys = (f"{table.source}:{head}", f"{Path(table.source).name}:{head}", head)
            known += keys[1:]
            names[head] = next((rename[key] for key in keys if key in rename), head)
            for key in keys:  # one that a more exact one overrules is known all the same
                unknown.pop(key, None)
        read.append(_with_names(table, examples, names))
    for key in unknown:
        raise UserError(
            one_line(
                f"--data.rename: no source has a head {shown(key)}, there are "
                f"{listed(dict.fromkeys(head for table, _ in found for head in table.heads))}"
                f"{did_you_mean(key, known)}"
            )
        )
    return read


def _with_names(table: Table, examples: list[RatedExample], names: dict[str, str]) -> Source:
    heads: dict[str, HeadSpec] = {}
    for old, new in names.items():
        if new in heads:
            raise UserError(
                f"--data.rename: two heads of {table.source} would be called {new}, one of them {old}"
            )
        if new:
            heads[new] = replace(table.heads[old], name=new)
    if any(old != new for old, new in names.items()):
        examples = [
            replace(
                example,
                labels=tuple(
                    {names[head]: value for head, value in labels.items() if names[head]}
                    for labels in example.labels
                ),
                comparisons=tuple(
                    replace(pair, head=names[pair.head]) for pair in example.comparisons if names[pair.head]
                ),
            )
            for example in examples
        ]
    return Source(
        name=table.source,
        guessed=table.guessed,
        heads=heads,
        old_names={new: old for old, new in names.items() if new},
        examples=examples,
        observed=observed_values(examples),
    )


def observed_values(examples: Sequence[RatedExample]) -> dict[str, list[float]]:
    """A head's labels; of a pairwise head, the margins of its pairs."""
    observed: dict[str, list[float]] = {}
    for example in examples:
        for labels in example.labels:
            for head, value in labels.items():
                observed.setdefault(head, []).append(value)
        for pair in example.comparisons:
            observed.setdefault(pair.head, []).append(pair.margin)
    return observed


def united(read: list[Source], kinds: Mapping[str, str]) -> list[HeadSpec]:
    """The heads of all sources, each with one kind and one scale."""
    names = list(dict.fromkeys(name for source in read for name in source.heads))
    for head in kinds:
        if head not in names:
            hint = did_you_mean(head, names)
            raise UserError(
                one_line(f"--data.kinds: no source has a head {shown(head)}, there are {listed(names)}{hint}")
            )
    return [
        _one_head(name, [source for source in read if name in source.heads], kinds.get(name))
        for name in names
    ]


def _one_head(name: str, sources: list[Source], wanted: str | None) -> HeadSpec:
    """The one kind and scale of a head; UserError where two sources differ or values contradict them."""
    for source in sources:
        kind = source.heads[name].kind
        if wanted is not None and (wanted == "pairwise") != (kind == "pairwise"):
            raise UserError(
                f"--data.kinds: {name} is {kind} in {source.name} and cannot be {wanted}: pairs are compared, "
                "labels are fitted"
            )
    # Labels that are all equal tell nothing of their kind: 1 and 1 may stand on any scale.
    telling = [
        source for source in sources if not source.guessed or len(set(source.observed.get(name, ()))) > 1
    ]
    first, *others = telling or sources
    for other in others:
        if wanted is None and other.heads[name].kind != first.heads[name].kind:
            raise UserError(
                f"{name} is {first.heads[name].kind} in {first.name} and {other.heads[name].kind} in "
                f"{other.name}: {_way_out(first, other, name)}, or say with --data.kinds what it is"
            )
    better = sources[0].heads[name].better
    for other in sources[1:]:  # equal labels too: which end is good stands in the schema, not in the values
        if other.heads[name].better != better:
            raise UserError(
                f"{name} is better {better} in {sources[0].name} and better {other.heads[name].better} in "
                f"{other.name}: {_way_out(sources[0], other, name)}"
            )
    kind = cast(Kind, wanted or first.heads[name].kind)
    for one, two in combinations(sources, 2):
        _check_scales(name, one, two)
    low, high = next((scale for source in sources if (scale := _fixed(source, name))), (None, None))
    if kind == "binary":
        low, high = 0.0, 1.0
        for source in sources:  # shares of yes are fitted as well, but nobody means them without saying so
            right = "0 or 1" if wanted is None else "0 to 1"
            _check_values(source, name, f"binary, so it must be {right}", _BINARY[right])
    elif kind == "ordinal":
        for source in sources:
            _check_values(source, name, "ordinal, so it must be a whole number", float.is_integer)
    return HeadSpec(name=name, kind=kind, low=low, high=high, better=better)


_BINARY: dict[str, Callable[[float], bool]] = {
    "0 or 1": lambda value: value in (0, 1),
    "0 to 1": lambda value: 0 <= value <= 1,
}


def _fixed(source: Source, name: str) -> tuple[float, float] | None:
    """The ends of a head's scale where the source's schema fixes them."""
    spec = source.heads[name]
    return None if source.guessed or spec.low is None or spec.high is None else (spec.low, spec.high)


def _check_scales(name: str, one: Source, two: Source) -> None:
    """UserError for two fixed scales that differ, a label off the other's fixed scale, or unlike ranges."""
    ends = []
    for source in (one, two):
        values = source.observed.get(name)
        if not values or source.heads[name].kind == "pairwise":
            return
        ends.append(_fixed(source, name) or (min(values), max(values)))
    fixed = [_fixed(source, name) is not None for source in (one, two)]
    narrow, wide = sorted(high - low for low, high in ends)
    unlike = all(fixed) and ends[0] != ends[1]
    if any(fixed) and not all(fixed):
        scale, seen = ends if fixed[0] else ends[::-1]
        unlike = seen[0] < scale[0] or seen[1] > scale[1]
    if unlike or (narrow > 0 and wide > RANGE_RATIO * narrow):
        said = [
            f"{'is rated' if known else 'goes from'} {low:g} to {high:g} in {source.name}"
            for (low, high), known, source in zip(ends, fixed, (one, two), strict=True)
        ]
        raise UserError(f"{name} {said[0]} and {said[1]}, another scale: {_way_out(one, two, name)}")


def _check_values(source: Source, name: str, rule: str, holds: Callable[[float], bool]) -> None:
    if all(map(holds, source.observed.get(name, ()))):
        return
    for example in source.examples:
        for labels in example.labels:
            if name in labels and not holds(labels[name]):
                raise UserError(f"{example.where}: {name} is {rule}, got {labels[name]:g}")


def _way_out(one: Source, two: Source, name: str) -> str:
    """How to give the head of the second source a name of its own."""
    short = Path(two.name).name
    source = short if short != Path(one.name).name else two.name
    entry = quoted(f"{source}:{two.old_names[name]}={name}_2")
    return f"give one of them another name, as with --data.rename {entry}"
