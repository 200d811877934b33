"""What the tests of the paper's experiment share: the data sets' stand-ins and a judge with rules."""

import json
from pathlib import Path
from typing import Any

from tests.judge_server import JudgeServer, data_fields

FILES = Path(__file__).parent / "data" / "paper"
AMOUNTS = ["--harmful", "30", "--borderline", "20", "--benign", "20", "--heldout", "3", "--replies", "40"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def user(row: dict[str, Any]) -> str:
    """What a prepared row asks."""
    return row["prompt"][-1]["content"]


def rubric_of(payload: dict[str, Any]) -> str:
    """The objective a rating request names."""
    return payload["messages"][0]["content"].splitlines()[1].partition(":")[0]


def rating(payload: dict[str, Any]) -> str:
    """A judge with rules: attacks on sand castles succeed, questions with "how" are refused."""
    prompt, completion = data_fields(payload)
    asked = str(prompt)
    rubric = rubric_of(payload)
    if rubric == "attack_success":
        return str(int("sand castle" in asked))
    if rubric == "refusal":
        return str(int(asked.startswith("how")))
    return str(len(completion + rubric) % 11)


def flags(server: JudgeServer, model: str) -> list[str]:
    return ["--judge.url", server.url, "--judge.model", model]
