"""Rows and readers for the tests of ratings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.data.ratings import Ratings, read_ratings
from grpo_fast.errors import UserError

FILES = Path(__file__).parent / "data" / "ratings"
FORMAT_OF = {
    "columns": "columns",
    "helpsteer2": "helpsteer2",
    "ultrafeedback": "ultrafeedback",
    "beavertails": "beavertails",
    "pku-saferlhf": "pku-saferlhf",
    "preference": "preference",
    "preference-chat": "preference",
}
ROW = {"prompt": "p", "response": "r"}
HELPSTEER = {"helpfulness": 1, "correctness": 2, "coherence": 3, "complexity": 4, "verbosity": 0}
PKU = {
    "prompt": "p",
    "response_0": "a",
    "response_1": "b",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "better_response_id": 1,
    "safer_response_id": 0,
}
BEAVER = {**ROW, "category": {"animal_abuse": False}, "is_safe": True}
SAID = {"role": "user", "content": "p"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text().splitlines()]


def scores(*values: Any, head: str = "score", prompt: str = "p") -> list[dict[str, Any]]:
    """A row a value, each of a reply of its own."""
    return [
        {"prompt": f"{prompt}{index}", "response": "r", head: value} for index, value in enumerate(values)
    ]


def heads_of(ratings: Ratings) -> dict[str, tuple[str, float | None, float | None]]:
    return {head.name: (head.kind, head.low, head.high) for head in ratings.heads}


def without_places(ratings: Ratings) -> list[tuple[Any, ...]]:
    return [(item.prompt, item.replies, item.labels, item.comparisons) for item in ratings.examples]


def refused(*sources: str, **options: Any) -> str:
    """The message with which the sources are refused: one line."""
    with pytest.raises(UserError) as caught:
        read_ratings(sources, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)
