"""The page of a benchmark's record: `python -m benchmarks.page FILE.json ...` makes it again, beside the file.

One self-contained HTML file: what was done, on what, tables, pictures, and the record itself. It holds no script and
loads nothing; every text is shown as text. The look is that of the pages of `grpo_fast.report`.
"""

from __future__ import annotations

import base64
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.tables import Table, cell
from grpo_fast.errors import UserError
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import write_atomically

LARGEST_INSIDE = 256 * 1024
"""Bytes of a record that the page still repeats; a larger one is only linked."""
PROVENANCE = ("device", "threads", "jobs", "dtype", "clock", "quick", "versions", "commit", "date", "command")
"""What a record says of where it comes from, in the page's order; what it lacks is left out."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG or JPEG file, embedded."""

    path: Path
    caption: str = ""


def write_page(
    path: Path,
    *,
    title: str,
    what: str,
    record: Mapping[str, Any],
    tables: Sequence[Table] = (),
    pictures: Sequence[Picture] = (),
    notes: Sequence[str] = (),
    source: Path | None = None,
) -> Path:
    """Write the page of `record` to `path` and return that.

    `what` is the paragraph on what was done; `notes` are limits and caveats, a sentence each; `source` is the JSON
    file, linked from the page (and its date taken, where the record has none). Raises UserError where the file cannot
    be written, ValueError for a row that is not as long as its table's head.
    """
    html = render(title, what, record, tables, pictures, notes, path=path, source=source)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html)
    return path


def render(
    title: str,
    what: str,
    record: Mapping[str, Any],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    notes: Sequence[str],
    *,
    path: Path,
    source: Path | None,
) -> str:
    """The page as text."""
    from markupsafe import Markup  # with the template's libraries, which a bare GPU machine may lack

    from grpo_fast.report.template import page_template

    for table in tables:
        for row in table.rows:
            if len(row) != len(table.head):
                raise ValueError(f"{table.title}: a row of {len(row)} cells under {len(table.head)} columns")
    text = json.dumps(record, indent=1, default=str)
    link = None
    if source is not None:
        beside = source.parent.resolve() == path.parent.resolve()
        link = f"./{quote(source.name)}" if beside else source.resolve().as_uri()
    return page_template("page.html.jinja", Path(__file__).parent).render(
        title=title,
        what=what,
        provenance=_provenance(record, source),
        tables=[
            {
                "title": table.title,
                "note": table.note,
                "head": table.head,
                "rows": [[cell(value) for value in row] for row in table.rows],
            }
            for table in tables
        ],
        pictures=[
            {"caption": picture.caption, "data": Markup(_embedded(picture.path))} for picture in pictures
        ],
        notes=notes,
        json=text if len(text.encode()) <= LARGEST_INSIDE else None,
        link=link,
        file=source.name if source else None,
    )


def command_line() -> str:
    """How this process was called, as one would type it."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return shlex.join(["python", *(["-m"] if spec else []), name, *sys.argv[1:]])


def page_of(source: Path, *, command: str | None = None) -> Path | None:
    """Write the page of a record's JSON file beside it, `FILE.html`, and return its path.

    On a bare machine that lacks a library of the pages that is said, and None comes back: the record is what counts.
    What the page shows is decided by `benchmarks.page_tables`; the pictures are those beside it that have its name
    (`FILE.png`) or that of its benchmark and device. `command` is how the record came to be, where it does not say.
    """
    from benchmarks.page_tables import shown

    record = read_record(source)
    if command and "command" not in record:
        record = record | {"command": command}
    drawn = [source.with_suffix(".png")]
    kind = str(record.get("benchmark", "")).replace("_", "-")
    device = "-".join(str(record.get("device", "")).lower().split())
    drawn += sorted(path for path in source.parent.glob("*.png") if path.stem.startswith(f"{kind}-{device}"))
    pictures = [Picture(path=path) for path in dict.fromkeys(drawn) if path.is_file()]
    try:
        title, what, tables, notes = shown(record)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: not what its benchmark writes ({type(error).__name__}: {error})"
        ) from error
    try:
        return write_page(
            source.with_suffix(".html"),
            title=title,
            what=what,
            record=record,
            tables=tables,
            pictures=pictures,
            notes=notes,
            source=source,
        )
    except ModuleNotFoundError as error:
        print(f"{source}: no page made of it ({error})", file=sys.stderr)
        return None


def pages_of(folder: Path, benchmark: str) -> None:
    """`page_of` every record of `benchmark` in a folder: after its pictures were drawn."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("benchmark") == benchmark:
            page_of(path)


def read_record(path: Path) -> dict[str, Any]:
    """A record from its file; UserError where it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not (record.get("benchmark") or record.get("suite")):
        raise UserError(f'{path} is no record of a benchmark: a JSON object with a "benchmark" is expected')
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: pages of records that are there already."""
    parser = Parser(prog="python -m benchmarks.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path, help="JSON files of benchmarks")
    for path in parser.parse_args(argv).records:
        if made := page_of(path):
            print(made)
    return 0


def _provenance(record: Mapping[str, Any], source: Path | None) -> dict[str, str]:
    found = {key: record[key] for key in PROVENANCE if record.get(key) not in (None, "", {})}
    if "date" not in found and source is not None and source.is_file():
        written = datetime.fromtimestamp(source.stat().st_mtime, UTC)
        found["file written"] = f"{written:%Y-%m-%d %H:%M} UTC"
    if isinstance(found.get("versions"), Mapping):
        found["versions"] = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    if str(found.get("commit", "")).endswith("+"):
        found["commit"] = f"{found['commit']} (with changes that are in no commit)"
    return {key: cell(value) for key, value in found.items()}


def _embedded(path: Path) -> str:
    """The file as a data: URI, nothing in it that a page would have to escape."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg" if data.startswith(b"\xff\xd8") else None
    if kind is None:
        raise UserError(f"{path} is no PNG or JPEG file")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


if __name__ == "__main__":
    run_command(main)
