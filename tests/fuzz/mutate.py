"""Hostile inputs from sound ones: bytes torn and swapped, values of the wrong kind in the right place, bad offsets.

Input `index` of a target depends on seed, target and index alone.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

NASTY = (
    "\x00", "\x1b[31m", "\x1b]0;title\x07", "\u202e", "\u2066", "\ufeff", "\u2028", "\r", "\r\n", "\n",
    "\t", "\x85", "é", "😀", "\U0010ffff", "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>",
    "javascript:alert(1)", "$\\frac{", "[bold]", "[link=http://x]", "{{7*7}}", "{% for %}", "%s%n",
    "../../../etc/passwd", "/dev/zero", "~root", "a" * 3000, "-1", "0", "1e999", "-1e308", "5e-324", "NaN",
    "Infinity", "-0", "9" * 400, "9" * 5000, "0x10", "1_0", "true", "null", "[" * 3000, "{\"a\":" * 3000,
    "]", "}", "\"", ",", ":", "=", "#", "--", "\\ud800", "\\u0000", "\\", "٣", "²",
)  # fmt: skip
RAW = (
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\xef\xbb\xbf",
    b"\x80\x04\x95",
    b"PAR1",
    b"\xfe\xff\x00a",
    b"\x1f\x8b",
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", [], {}, [[]], [None], [0], [1.5, "a"], {"": None},
    {"a": {"b": []}}, "\ud800", *NASTY[:30],
)  # fmt: skip


def mutated(form: str, corpus: list[bytes], rng: random.Random) -> bytes:
    """One hostile input made of a sound one."""
    data = rng.choice(corpus)
    if form in ("json", "jsonl") and rng.random() < 0.7:
        data = _json_mutated(form, data, rng)
    elif form == "safetensors" and rng.random() < 0.8:
        data = _header_mutated(data, rng)
    elif form == "text" and rng.random() < 0.5:
        data = _lines_mutated(data, rng)
    if rng.random() < (0.25 if form in ("json", "jsonl", "safetensors") else 0.8):
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            data = rng.choice(_BYTES)(data, rng)
    return data[: 1 << 20]


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.choice((1, 2, 4, 16, 200)))


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def _swap(data: bytes, rng: random.Random) -> bytes:
    a, b, c, d = sorted(rng.randint(0, len(data)) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _double(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 50)) + data[stop:]


def _drop(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(data))
    piece = rng.choice(RAW) if rng.random() < 0.3 else rng.choice(NASTY).encode()
    return data[:at] + piece + data[at:]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _number(data: bytes, rng: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not digits:
        return data
    at = rng.choice(digits)
    return (
        data[:at] + rng.choice((b"9" * 400, b"-1", b"1e999", b"0.1.2", b"1e-400", b"9" * 20)) + data[at + 1 :]
    )


_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut,
    _swap,
    _double,
    _drop,
    _insert,
    _insert,
    _flip,
    _number,
)


def _lines_mutated(data: bytes, rng: random.Random) -> bytes:
    """A line doubled, dropped, moved, or its end replaced."""
    lines = data.split(b"\n")
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            lines.insert(to, lines[at])
        case 1:
            lines.insert(to, lines.pop(at))
        case 2:
            del lines[at]
        case _:
            head, mark, tail = lines[at].partition(b"=") if rng.random() < 0.8 else (b"", b"", lines[at])
            value = rng.choice(VALUES)
            said = json.dumps(value) if rng.random() < 0.6 else str(value)
            lines[at] = (
                head + mark + said.encode(errors="surrogatepass") + (tail if rng.random() < 0.2 else b"")
            )
    return b"\n".join(lines)


def _json_mutated(form: str, data: bytes, rng: random.Random) -> bytes:
    rows = [json.loads(line) for line in data.splitlines()] if form == "jsonl" else [json.loads(data)]
    at = rng.randrange(len(rows))
    for _ in range(rng.choice((1, 1, 2, 4))):
        rows[at] = changed(rows[at], rng)
    escaped = rng.random() < 0.7
    lines = [json.dumps(row, ensure_ascii=escaped).encode(errors="surrogatepass") for row in rows]
    return b"\n".join(lines) + (b"\n" if rng.random() < 0.8 else b"")


def changed(document: Any, rng: random.Random) -> Any:
    """The document with one thing in it of another kind, elsewhere, doubled or gone."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []
    _places(document, places)
    if not places or rng.random() < 0.03:
        return rng.choice(VALUES)
    inside, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del inside[key]
        case 1:
            inside[key] = [inside[key]] * rng.choice((1, 2, 100))
        case 2:
            inside[key] = {"a": inside[key]}
        case 3:
            other, where = rng.choice(places)
            inside[key] = copy.deepcopy(other[where])
        case 4 if isinstance(inside, dict):
            inside[rng.choice(NASTY)] = inside.pop(key)
        case 5 if isinstance(inside[key], str):
            at = rng.randint(0, len(inside[key]))
            inside[key] = inside[key][:at] + rng.choice(NASTY) + inside[key][at:]
        case 6 if isinstance(inside[key], int | float):
            inside[key] = rng.choice(
                (-1, 0, 0.5, 2**31, 10**9, 10**18, 10**30, 1e308, float("nan"), -(2**63))
            )
        case _:
            inside[key] = rng.choice(VALUES)
    return document


def _places(document: Any, found: list[tuple[Any, Any]]) -> None:
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in items:
        found.append((document, key))
        _places(value, found)


def _header_mutated(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else: names, dtypes, shapes, offsets, its own length."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    match rng.randrange(7):
        case 0:
            return rng.choice((0, 1, size - 1, size + 1, 2**40, 2**63)).to_bytes(8, "little") + data[8:]
        case 1:
            body = (
                body[: rng.randint(0, len(body))]
                if rng.random() < 0.5
                else body + b"\0" * rng.choice((1, 8, 4096))
            )
        case 2:
            names = [name for name in header if name != "__metadata__"]
            a, b = rng.choice(names), rng.choice(names)
            header[a], header[b] = header[b], header[a]
        case 3:
            entry = header[rng.choice([name for name in header if name != "__metadata__"])]
            entry["dtype"] = rng.choice(
                ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", None)
            )
        case 4:
            entry = header[rng.choice([name for name in header if name != "__metadata__"])]
            entry["shape"] = rng.choice(
                ([], [0], [1], [2**31, 2**31], [-1], entry["shape"][::-1], [*entry["shape"], 1])
            )
        case 5:
            body = rng.randbytes(len(body))
        case _:
            header = changed(header, rng)
    text = json.dumps(header).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def documents(form: str, corpus: list[bytes]) -> st.SearchStrategy[bytes]:
    """Inputs that hypothesis makes up: JSON with the corpus's own keys for a JSON target, else text or bytes."""
    if form not in ("json", "jsonl"):
        text = st.text(st.characters(exclude_categories=()), max_size=200).map(
            lambda t: t.encode(errors="surrogatepass")
        )
        return st.one_of(st.binary(max_size=300), text)
    keys: set[str] = set()
    for data in corpus:
        for line in data.splitlines() if form == "jsonl" else [data]:
            _keys(json.loads(line), keys)
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(st.characters(exclude_categories=()), max_size=20),
        st.sampled_from(VALUES),
        st.sampled_from(sorted(keys) or [""]),
    )
    names = st.one_of(st.sampled_from(sorted(keys) or [""]), st.text(max_size=5))
    nested = st.recursive(
        scalars,
        lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(names, x, max_size=6)),
        max_leaves=20,
    )
    row = st.one_of(st.dictionaries(names, nested, max_size=8), nested)
    if form == "json":
        return row.map(_dumped)
    return st.lists(row, max_size=4).map(lambda rows: b"\n".join(map(_dumped, rows)))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _keys(document: Any, found: set[str]) -> None:
    if isinstance(document, dict):
        found |= document.keys()
    for value in (
        document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    ):
        _keys(value, found)
