"""The public data sets of the experiment, and what a row of each says.

Nothing of them is in this repository: they are loaded with `datasets`, or from files of the same columns in a folder
of the user's. A prompt is harmful (it asks for something harmful), borderline (it only sounds so) or benign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_fast.data.records import one_line, read_records
from grpo_fast.errors import UserError

Kind = Literal["harmful", "borderline", "benign"]
KINDS: tuple[Kind, ...] = ("harmful", "borderline", "benign")
SYSTEM_PROMPT = "You are a helpful assistant."
FILES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A rated reply for the reward model."""

    prompt: str
    response: str
    safety: float | None
    """What people said of it, 1 safe or 0 unsafe; None: nobody did."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set: where it is, and how its rows are read."""

    name: str
    """Its name in the records, and of its file in a folder of the user's."""
    hub: str
    """Hub id[:subset]."""
    split: str
    columns: tuple[str, ...]
    """What a row must have."""
    licence: str
    prompts: Callable[[Iterable[dict[str, Any]]], Iterator[tuple[str, Kind]]]
    training: bool = True
    """False: a benchmark, held out as a whole."""
    replies: Callable[[Iterable[dict[str, Any]]], Iterator[Reply]] | None = None


def chat(prompt: str) -> list[dict[str, str]]:
    """A prompt as policy and reward model read it: both were made for chats, and must see the same one."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]


def read(source: Source, folder: Path | None) -> list[dict[str, Any]]:
    """The rows, from `folder`/NAME.jsonl (.json, .csv, .parquet) where a folder is given, else from the hub.

    UserError of one line where they cannot be had or lack a column.
    """
    if folder is None:
        place = source.hub
    else:
        found = [path for end in FILES if (path := folder / f"{source.name}{end}").is_file()]
        if not found:
            raise UserError(
                f"--files {folder}: holds no {source.name}.jsonl (or {', '.join(FILES[1:])}), the rows of "
                f"{source.hub}, split {source.split}"
            )
        place = str(found[0])
    try:
        rows = list(read_records(place, split=source.split, what="data set"))
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror or error}") from None
    except UserError as error:
        if folder is not None:
            raise
        raise UserError(
            one_line(f"{error}").rstrip(".…")
            + f"; without a connection give --files FOLDER with {source.name}.jsonl"
        ) from None
    if not rows:
        raise UserError(f"{place}: has no rows")
    for where, row in rows:
        if absent := [name for name in source.columns if name not in row]:
            there = ", ".join(map(str, row)) or "none"
            raise UserError(
                one_line(f"{where}: no column {absent[0]}, which {source.hub} has; there are {there}")
            )
    return [row for _, row in rows]


def _truth(value: Any) -> bool:
    """A label of a file whose format may know texts only."""
    return value.strip().lower() in ("true", "1") if isinstance(value, str) else bool(value)


def _beavertails(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Kind]]:
    """Prompts of which at least one reply was found unsafe: they can draw harm."""
    return ((row["prompt"], "harmful") for row in rows if not _truth(row["is_safe"]))


def _beavertails_replies(rows: Iterable[dict[str, Any]]) -> Iterator[Reply]:
    for row in rows:
        yield Reply(prompt=row["prompt"], response=row["response"], safety=float(_truth(row["is_safe"])))


def _safe_rlhf(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Kind]]:
    """Prompts whose two replies were both found unsafe."""
    names = ("is_response_0_safe", "is_response_1_safe")
    return ((row["prompt"], "harmful") for row in rows if not any(_truth(row[name]) for name in names))


def _helpsteer2_replies(rows: Iterable[dict[str, Any]]) -> Iterator[Reply]:
    return (Reply(prompt=row["prompt"], response=row["response"], safety=None) for row in rows)


def _column(name: str, kind: Kind) -> Callable[[Iterable[dict[str, Any]]], Iterator[tuple[str, Kind]]]:
    return lambda rows: ((row[name], kind) for row in rows)


def _xstest(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Kind]]:
    """Safe prompts that sound unsafe, and the unsafe ones they are contrasted with."""
    return ((row["prompt"], "borderline" if row["label"] == "safe" else "harmful") for row in rows)


SOURCES = (
    Source(
        name="beavertails",
        hub="PKU-Alignment/BeaverTails",
        split="30k_train",
        columns=("prompt", "response", "is_safe"),
        licence="CC BY-NC 4.0",
        prompts=_beavertails,
        replies=_beavertails_replies,
    ),
    Source(
        name="pku-saferlhf",
        hub="PKU-Alignment/PKU-SafeRLHF",
        split="train",
        columns=("prompt", "is_response_0_safe", "is_response_1_safe"),
        licence="CC BY-NC 4.0",
        prompts=_safe_rlhf,
    ),
    Source(
        name="or-bench",
        hub="bench-llm/or-bench:or-bench-80k",
        split="train",
        columns=("prompt", "category"),
        licence="CC BY 4.0",
        prompts=_column("prompt", "borderline"),
    ),
    Source(
        name="helpsteer2",
        hub="nvidia/HelpSteer2",
        split="train",
        columns=("prompt", "response"),
        licence="CC BY 4.0",
        prompts=_column("prompt", "benign"),
        replies=_helpsteer2_replies,
    ),
    Source(
        name="jbb-harmful",
        hub="JailbreakBench/JBB-Behaviors:behaviors",
        split="harmful",
        columns=("Goal",),
        licence="MIT",
        prompts=_column("Goal", "harmful"),
        training=False,
    ),
    Source(
        name="jbb-benign",
        hub="JailbreakBench/JBB-Behaviors:behaviors",
        split="benign",
        columns=("Goal",),
        licence="MIT",
        prompts=_column("Goal", "borderline"),
        training=False,
    ),
    Source(
        name="xstest",
        hub="Paul/XSTest",
        split="train",
        columns=("prompt", "label"),
        licence="CC BY 4.0",
        prompts=_xstest,
        training=False,
    ),
)
