"""The heads of several sources: their new names, and one kind and one scale for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import cast

from grpo_fast.data.rated import HeadSpec, Kind, RatedExample, counted, listed, quoted, shown
from grpo_fast.data.records import one_line
from grpo_fast.data.schemas import Table
from grpo_fast.errors import UserError, did_you_mean

RANGE_RATIO = 3.0  # two unscaled sources whose ranges differ by more are taken to be on different scales
DOUBTFUL_RATIO = 1.2  # and with more than this they may be
DOUBTFUL_SHIFT = 0.15  # of the wider range, between the lower or the upper ends of two ranges
MOSTLY_BINARY = 0.9  # of a column's values are 0 or 1: it may be meant as binary
FAR = 8.0  # standard deviations of the other labels from their mean: it may be a slip
ENOUGH = 20  # labels, to say of one that it is far off


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


def _ends(name: str, one: Source, two: Source) -> list[tuple[float, float]]:
    """The scale of a head in two sources: its fixed ends or the observed ones. Empty where one has none."""
    ends = []
    for source in (one, two):
        values = source.observed.get(name)
        if not values or source.heads[name].kind == "pairwise":
            return []
        ends.append(_fixed(source, name) or (min(values), max(values)))
    return ends


def _scales(name: str, ends: list[tuple[float, float]], one: Source, two: Source) -> str:
    said = [
        f"{'is rated' if _fixed(source, name) else 'goes from'} {low:g} to {high:g} in {source.name}"
        for (low, high), source in zip(ends, (one, two), strict=True)
    ]
    return f"{name} {said[0]} and {said[1]}"


def _check_scales(name: str, one: Source, two: Source) -> None:
    """UserError for two fixed scales that differ, a label off the other's fixed scale, or unlike ranges."""
    ends = _ends(name, one, two)
    if not ends:
        return
    fixed = [_fixed(source, name) is not None for source in (one, two)]
    narrow, wide = sorted(high - low for low, high in ends)
    unlike = all(fixed) and ends[0] != ends[1]
    if any(fixed) and not all(fixed):
        scale, seen = ends if fixed[0] else ends[::-1]
        unlike = seen[0] < scale[0] or seen[1] > scale[1]
    if unlike or (narrow > 0 and wide > RANGE_RATIO * narrow):
        said = _scales(name, ends, one, two)
        raise UserError(f"{said}, another scale: {_way_out(one, two, name)}")


def doubts(
    read: Sequence[Source], kept: Sequence[RatedExample], heads: Sequence[HeadSpec], kinds: Mapping[str, str]
) -> list[str]:
    """One line for whatever is no fault but looks like one. `kept`: the examples of all sources, each once."""
    places: dict[str, list[tuple[float, str]]] = {}
    for example in kept:
        for labels in example.labels:
            for name, value in labels.items():
                places.setdefault(name, []).append((value, example.where))
    found = []
    for head in heads:
        sources = [source for source in read if head.name in source.heads]
        if head.kind == "regression" and head.name not in kinds:
            found += [line for source in sources if (line := _nearly_binary(head.name, source))]
        if head.kind in ("regression", "ordinal"):
            if head.low is None:  # what a fixed scale allows is no slip, however rare
                found += _far_off(head.name, places.get(head.name, []))
            found += [line for one, two in combinations(sources, 2) if (line := _unlike(head.name, one, two))]
    return found


def _nearly_binary(name: str, source: Source) -> str:
    values = source.observed.get(name, [])
    odd = sum(value not in (0, 1) for value in values)
    if not source.guessed or not odd or len(values) - odd < MOSTLY_BINARY * len(values):
        return ""
    value, where = next(
        (labels[name], example.where)
        for example in source.examples
        for labels in example.labels
        if name in labels and labels[name] not in (0, 1)
    )
    return (
        f"head {name} is taken for a regression: {odd} of {counted(len(values), 'value')} "
        f"{'is' if odd == 1 else 'are'} neither 0 nor 1, the first {value:g} at {where}; if it is a yes or no, "
        f"--data.kinds {quote(f'{name}=binary')} refuses by line what is not in 0 to 1"
    )


def _far_off(name: str, labels: list[tuple[float, str]]) -> list[str]:
    """Labels far from the mean of the others; more than one in 65 that are equal are no longer far."""
    if len(labels) < ENOUGH:
        return []
    values = [value for value, _ in labels]
    mean, others = fmean(values), len(values) - 1
    square = sum((value - mean) ** 2 for value in values)
    far = []
    for value, where in labels:
        # Without the label the mean moves away from it, and its share of the squares is gone.
        away = (value - mean) * len(values) / others
        spread = max(square - away * (value - mean), 0.0) / others
        if away**2 > FAR**2 * spread:
            far.append((value, where))
    if not far:
        return []
    are = "is" if len(far) == 1 else "are"
    return [
        f"head {name}: {counted(len(far), 'label')} {are} more than {FAR:g} standard deviations of the others "
        f"from their mean, the first {far[0][0]:g} at {far[0][1]}"
    ]


def _unlike(name: str, one: Source, two: Source) -> str:
    """Said of two ranges of visibly different widths or places."""
    ends = _ends(name, one, two)
    if not ends:
        return ""
    narrow, wide = sorted(high - low for low, high in ends)
    (low, high), (other_low, other_high) = ends
    shifts = [abs(low - other_low), abs(high - other_high)]
    if narrow == 0:  # one value tells no range, only whether it lies off the other's
        shifts = [max(low, other_low) - min(high, other_high)]
    if wide > DOUBTFUL_RATIO * narrow > 0 or max(shifts) > DOUBTFUL_SHIFT * wide > 0:
        return f"{_scales(name, ends, one, two)}: if these are two scales, {_way_out(one, two, name)}"
    return ""


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
