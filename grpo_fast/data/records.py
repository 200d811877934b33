"""Reading records: JSONL, JSON, CSV, Parquet and hub data sets, each giving (where it stands, columns).

The standard library's own parsers, because they know the line of a mistake. Every fault of the file is a
`UserError` of one line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError

Records = Iterator[tuple[str, dict[str, Any]]]


def read_records(source: str, *, split: str = "train", what: str = "prompts file") -> Records:
    """The records of a .jsonl, .json, .csv or .parquet file, or of a data set: `id`, `id:subset`, folder.

    `what` is what messages call the source.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise UserError(f"{what} {source} must end in {', '.join(_READERS)}")
        return _READERS[path.suffix.lower()](path)
    if path.is_dir() or _is_hub_id(source):
        return _hub(source, split)
    raise UserError(f"{what} {source} does not exist")


def one_line(message: str) -> str:
    """One line, of a length that can be read."""
    flat = " ".join(message.split())
    return flat if len(flat) <= 300 else flat[:299] + "…"


def _decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            one_line(f"{path}:{line + error.lineno - 1}: broken JSON: {error.msg} (column {error.colno})")
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits; thousands of brackets
        raise UserError(f"{path}:{line}: broken JSON: nested too deeply or a number too long") from None


def _jsonl(path: Path) -> Records:
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            text = _decode(data, path, number).rstrip()
            if text:
                yield f"{path}:{number}", _object(_parse_json(text, path, number), f"{path}:{number}")


def _json(path: Path) -> Records:
    text = _decode(path.read_bytes(), path)
    if not text.strip():
        return
    rows = _parse_json(text, path, 1)
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list of objects, one a row (or be named .jsonl)")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", _object(row, f"{path}, row {number}")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(one_line(f"{where}: must be an object with named columns, got {json.dumps(value)}"))
    return value


def _csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 kB
    text = io.StringIO(_decode(path.read_bytes(), path), newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}:{reader.line_num}: the number of fields differs from the header's "
                    f"{len(reader.fieldnames or ())}"
                )
            yield f"{path}:{reader.line_num}", dict(row)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num + 1}: broken CSV: {error}") from None


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(one_line(f"{path} is no readable Parquet file: {error}")) from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _is_hub_id(source: str) -> bool:
    return not source.lower().endswith(tuple(_READERS)) and bool(
        re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source)
    )


def _hub(source: str, split: str) -> Records:
    import datasets

    name, _, subset = source.partition(":")
    try:
        if (Path(source) / "state.json").is_file():
            table = datasets.load_from_disk(source)
        elif (Path(source) / "dataset_dict.json").is_file():
            splits = datasets.DatasetDict.load_from_disk(source)
            if split not in splits:
                raise ValueError(f"the splits are {', '.join(map(str, splits))}")
            table = splits[split]
        else:
            table = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # dozens of types, from the network to the data set's own files
        raise UserError(one_line(f"cannot load data set {source}, split {split}: {error}")) from None
    for number, row in enumerate(table, start=1):
        yield f"{source}, {split} row {number}", dict(row)


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
