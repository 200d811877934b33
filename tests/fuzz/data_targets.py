"""Prompts, ratings in every schema, and what a tokenizer makes of a text."""

from __future__ import annotations

import csv
import functools
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

from grpo_fast.data.prompts import Row, hold_out, read_rows, tokenize
from grpo_fast.data.ratings import hold_out_ratings, read_ratings
from grpo_fast.models.reward_data import heads_of
from tests.fuzz.target import Target
from tests.rating_cases import FILES, FORMAT_OF, rows_of
from tests.tiny_models import byte_tokenizer

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "What is two and two?", "kind": "sum", "level": 1},
    {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}],
        "kind": None,
        "level": 2,
    },
    {"prompt": "Warum nicht? ✓", "kind": "german", "level": 2.5},
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def _prompts(suffix: str):
    def run(data: bytes, folder: Path) -> None:
        (folder / f"prompts.{suffix}").write_bytes(data)
        rows = read_rows(str(folder / f"prompts.{suffix}"))
        hold_out([*rows, Row("one more", {}, "")], 1)
        tokenize(rows, _tokenizer(), max_prompt_tokens=10_000)

    return run


@functools.cache
def _tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def _ratings(suffix: str, format: str, kinds: dict[str, str] | None = None):
    def run(data: bytes, folder: Path) -> None:
        (folder / f"ratings.{suffix}").write_bytes(data)
        ratings = read_ratings([str(folder / f"ratings.{suffix}")], format=format, kinds=kinds or {})
        heads_of(ratings)
        hold_out_ratings(ratings, 1)

    return run


SCORED = [{"prompt": f"p{i}", "response": "r", "score": i % 3, "tone": i / 2} for i in range(6)]


def _round_trip(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "replace")
    if text.strip():
        [prompt] = tokenize([Row(text, {}, "here")], _tokenizer())
        special = _tokenizer().all_special_tokens
        if not any(word in text for word in special):
            back = _tokenizer().decode(prompt.token_ids)
            assert back == unicodedata.normalize("NFC", text), "the text does not come back"


PLAIN = [row for row in PROMPTS if isinstance(row["prompt"], str)]
TARGETS = {
    "prompts.jsonl": Target(run=_prompts("jsonl"), corpus=lambda: [_jsonl(PROMPTS)], form="jsonl"),
    "prompts.json": Target(run=_prompts("json"), corpus=lambda: [json.dumps(PROMPTS).encode()], form="json"),
    "prompts.csv": Target(run=_prompts("csv"), corpus=lambda: [_csv(PLAIN)]),
    "prompts.parquet": Target(
        run=_prompts("parquet"), corpus=lambda: [_parquet(PLAIN), _parquet(PROMPTS[1:2])], form="bytes"
    ),
    **{
        f"ratings.{name}": Target(
            run=_ratings("jsonl", format), corpus=lambda name=name: [_jsonl(rows_of(name))], form="jsonl"
        )
        for name, format in FORMAT_OF.items()
    },
    "ratings.auto": Target(
        run=_ratings("jsonl", "auto"),
        corpus=lambda: [path.read_bytes() for path in sorted(FILES.glob("*.jsonl"))],
        form="jsonl",
    ),
    "ratings.csv": Target(run=_ratings("csv", "columns"), corpus=lambda: [_csv(SCORED)]),
    "ratings.ordinal": Target(
        run=_ratings("jsonl", "columns", {"score": "ordinal"}), corpus=lambda: [_jsonl(SCORED)], form="jsonl"
    ),
    "tokenizer.round_trip": Target(
        run=_round_trip,
        corpus=lambda: ["A line of plain text, ünd 😀.".encode(), "<|end|> \u202e \x00".encode()],
    ),
}
