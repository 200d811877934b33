"""Ratings: what a reward model is trained on, from one source or several, in one shape.

`read_ratings` needs no model: bad data is refused before one is loaded, with the file and the line. What a
schema looks like is in `schemas.py`; here sources are put together, and what they say is weighed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_fast.data.rated import (
    KINDS,
    Comparison,
    HeadSpec,
    Notes,
    RatedExample,
    counted,
    is_number,
    listed,
    note,
    prompt_key,
    quoted,
    sentences,
    shown,
)
from grpo_fast.data.rating_heads import doubts, observed_values, renamed, united
from grpo_fast.data.records import one_line, read_records
from grpo_fast.data.schemas import INDEX_COLUMNS, REPLIES, SCHEMAS, Schema, Table
from grpo_fast.errors import UserError, did_you_mean

FEW = 20  # labels or pairs of a head; with fewer a warning is due


@dataclass(frozen=True, kw_only=True)
class Ratings:
    examples: list[RatedExample]
    heads: list[HeadSpec]
    """In order of first appearance over the sources; each has a label or a pair."""
    warnings: list[str]
    """One line each."""


def read_ratings(
    sources: Sequence[str],
    *,
    format: str = "auto",
    kinds: Mapping[str, str] = {},
    rename: Mapping[str, str] = {},
    split: str = "train",
) -> Ratings:
    """Rated replies of .jsonl, .json, .csv and .parquet files, hub ids and folders saved by `datasets`.

    `format`: a name in `SCHEMAS`, or "auto" to tell by the columns of each source's first record. `rename`:
    {old head: new head} in every source, or {"source:old head": new head} in one, called by its name as given
    or by the last part of it; an empty new name leaves the head out. `kinds`: {head: kind}, by the new names,
    instead of the schema's kind or the one that the values suggest (binary where all are 0 or 1, otherwise
    regression). `split`: of a data set.

    Repeated ratings and pairs are dropped and counted; contradictory ones stay and are counted. Warned of are
    columns that are 0 and 1 but for a few values, labels far off the others, and ranges of two sources that
    may be two scales.

    Raises `UserError` for sources that cannot be read or are of no known shape; for a label that is no
    finite number, is off its scale or contradicts its kind; for a head that has different kinds, scales or
    good ends in two sources, whose labels are all equal, or that `kinds` or `rename` name and no source has.
    """
    if isinstance(sources, str):  # a sequence of texts as well, of one letter each
        sources = [sources]
    if not sources:
        raise UserError("no ratings are given: name at least one file or data set")
    for head, kind in kinds.items():
        if kind not in KINDS:
            hint = did_you_mean(str(kind), KINDS)
            raise UserError(
                f"--data.kinds: {head} must be one of {', '.join(KINDS)}, got {shown(kind)}{hint}"
            )
    warnings: list[str] = []
    found = []
    for source in sources:
        table, examples = _read_source(source, format, split)
        warnings += [*table.warnings, *sentences(table.notes)]
        found.append((table, examples))
    read = renamed(found, rename)
    heads = united(read, kinds)
    notes: Notes = {}
    kept = _without_repeats([example for source in read for example in source.examples], notes)
    observed = observed_values(kept)
    warnings += sentences(notes)
    warnings += [
        f"head {head.name} left out: it has no labels" for head in heads if head.name not in observed
    ]
    heads = [head for head in heads if head.name in observed]
    if not heads:
        raise UserError(f"nothing is rated in {listed(sources)}: every label is missing")
    _check_varied(heads, observed)
    for head in heads:
        if len(observed[head.name]) < FEW:
            unit = "pair" if head.kind == "pairwise" else "label"
            warnings.append(f"head {head.name} has only {counted(len(observed[head.name]), unit)}")
    # These end with the way out and name two files, so they are flattened but not cut short.
    unsure = [" ".join(line.split()) for line in doubts(read, kept, heads, kinds)]
    return Ratings(examples=kept, heads=heads, warnings=[*map(one_line, warnings), *unsure])


def hold_out_ratings(ratings: Ratings, size: int) -> tuple[Ratings, Ratings]:
    """(training ratings, held-out ratings): `size` prompts at even distances with all that is said of them.

    At most a fifth of the prompts, but at least one, is held out; the held-out side's warnings say so where
    `size` is more.

    Raises `UserError` when heads would have nothing left to learn from.
    """
    assert size >= 0, size
    keys = [prompt_key(example.prompt) for example in ratings.examples]
    prompts = list(dict.fromkeys(keys))
    taken = min(size, max(1, len(prompts) // 5), len(prompts))
    held = {prompts[index * len(prompts) // taken] for index in range(taken)}
    sides: tuple[list[RatedExample], list[RatedExample]] = ([], [])
    for key, example in zip(keys, ratings.examples, strict=True):
        sides[key in held].append(example)
    left, out = map(observed_values, sides)
    are = "is" if taken == 1 else "are"
    try:
        _check_varied(ratings.heads, left)
    except UserError as error:
        raise UserError(
            f"--data.eval-size {size}: {taken} of {counted(len(prompts), 'prompt')} {are} held out, and of "
            f"what is left {error}"
        ) from None
    warnings = []
    if size > taken:
        there = "is" if len(prompts) == 1 else "are"
        warnings.append(
            f"data.eval_size = {size}, but there {there} {counted(len(prompts), 'prompt')}: {taken} {are} "
            "held out"
        )
    if size:
        warnings += [
            f"head {head.name} has no held-out labels" for head in ratings.heads if head.name not in out
        ]
    return replace(ratings, examples=sides[0]), replace(ratings, examples=sides[1], warnings=warnings)


# ---- one source ----


def _read_source(source: str, format: str, split: str) -> tuple[Table, list[RatedExample]]:
    """A source's table and its examples in order."""
    known = ("auto", *SCHEMAS)
    if format not in known:
        hint = did_you_mean(format, known)
        raise UserError(f"--data.format must be one of {', '.join(known)}, got {shown(format)}{hint}")
    try:
        records = list(read_records(source, split=split, what="ratings file"))
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from None
    if not records:
        raise UserError(f"ratings file {source} has no rows")
    where, first = records[0]
    name = _detected(where, first) if format == "auto" else format
    schema = SCHEMAS[name]
    absent = [column for column in schema.needed if column not in first]
    if absent:
        raise UserError(f"{where}: {name} needs {listed(absent)}, there are {listed(first) or 'no columns'}")
    table = Table(source=source, records=records, guessed=name == "columns")
    examples = list(schema.read(table))
    unread = _unread_numbers(table, schema) if schema.needed else []
    if unread:
        table.warnings.append(f"{source}: columns ignored, as {name} has no such heads: {listed(unread)}")
    records.clear()  # the examples hold what is needed of them
    return table, examples


def _detected(where: str, first: dict[str, Any]) -> str:
    """The schema of a source by the columns of its first record; `columns` where no public one fits."""
    fits = [name for name, schema in SCHEMAS.items() if schema.needed and set(schema.needed) <= first.keys()]
    if len(fits) == 1:
        return fits[0]
    if not fits and ("messages" in first or ("prompt" in first and any(name in first for name in REPLIES))):
        return "columns"
    trouble = f"{' and '.join(fits)} both fit" if fits else "no format fits"
    raise UserError(
        f"{where}: {trouble} the columns {listed(first) or '(none)'}: give --data.format, one of "
        f"{', '.join(SCHEMAS)}; columns needs prompt, response and a column of numbers a head"
    )


def _unread_numbers(table: Table, schema: Schema) -> list[str]:
    """Columns of numbers that a public schema does not know: heads that the user may have added."""
    known = {*schema.needed, *schema.optional, *INDEX_COLUMNS}
    pairs = ((name, value) for _, columns in table.records for name, value in columns.items())
    return list(
        dict.fromkeys(
            name for name, value in pairs if name not in known and is_number(value, typed=table.typed)
        )
    )


# ---- what is said twice, and what says nothing ----


def _without_repeats(examples: list[RatedExample], notes: Notes) -> list[RatedExample]:
    """The examples without repeated ratings and pairs and without replies of which nothing is said."""
    ratings: set[tuple[str, str, frozenset[tuple[str, float]]]] = set()
    first: dict[tuple[str, str, str], float] = {}
    pairs: set[tuple[str, str, str, str]] = set()
    seen: set[tuple[str, str, str, str, float]] = set()
    kept = []
    for example in examples:
        key = prompt_key(example.prompt)
        compared = {place for pair in example.comparisons for place in (pair.better, pair.worse)}
        labels = []
        for place, (reply, given) in enumerate(zip(example.replies, example.labels, strict=True)):
            rating = key, reply, frozenset(given.items())
            if not given and place not in compared:
                note(notes, "reply", "without any label left out", example.where)
            elif given and rating in ratings:
                note(notes, "repeated rating", "dropped", example.where)
                given = {}
            elif given:
                ratings.add(rating)
                before = [first.setdefault((key, reply, head), value) for head, value in given.items()]
                if before != list(given.values()):
                    note(notes, "rating", "kept that contradicted an earlier one", example.where)
            labels.append(given)
        comparisons = []
        for pair in example.comparisons:
            better, worse = example.replies[pair.better], example.replies[pair.worse]
            if (key, pair.head, better, worse, pair.margin) in seen:
                note(notes, "repeated pair", "dropped", example.where)
                continue
            seen.add((key, pair.head, better, worse, pair.margin))
            if (key, pair.head, worse, better) in pairs:
                note(notes, "pair", "kept that contradicted an earlier one", example.where)
            pairs.add((key, pair.head, better, worse))
            comparisons.append(pair)
        kept.append(_compact(example, labels, comparisons))
    return [example for example in kept if example.replies]


def _compact(
    example: RatedExample, labels: list[dict[str, float]], comparisons: list[Comparison]
) -> RatedExample:
    """The example with these labels and pairs, and with the replies alone that have one."""
    used = {place for pair in comparisons for place in (pair.better, pair.worse)}
    used |= {place for place, given in enumerate(labels) if given}
    places = {old: new for new, old in enumerate(sorted(used))}
    return replace(
        example,
        replies=tuple(example.replies[place] for place in places),
        labels=tuple(labels[place] for place in places),
        comparisons=tuple(
            replace(pair, better=places[pair.better], worse=places[pair.worse]) for pair in comparisons
        ),
    )


def _check_varied(heads: Sequence[HeadSpec], observed: Mapping[str, list[float]]) -> None:
    """UserError that names every head of which nothing can be learned."""
    flat = {}
    for head in heads:
        values = observed.get(head.name, [])
        if not values:
            flat[head.name] = "no pairs" if head.kind == "pairwise" else "no labels"
        elif head.kind != "pairwise" and min(values) == max(values):
            flat[head.name] = f"{counted(len(values), 'label')}, all {values[0]:g}"
    if flat:
        said = ", ".join(f"{name} ({why})" for name, why in flat.items())
        entries = " ".join(quoted(f"{name}=") for name in flat)
        raise UserError(
            f"nothing can be learned of head{'s' * (len(flat) > 1)} {said}; rate more replies, or leave "
            f"{'it' if len(flat) == 1 else 'them'} out with --data.rename {entries}"
        )
