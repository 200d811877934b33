"""The benchmark of the planner: its cases mean what they say, and its record can be planned anew and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import memory
from benchmarks.memory_cases import CASES, Case, planned
from grpo_fast.packing import pack

TINY = Case(hidden=32, inner=64, layers=1, heads=2, vocabulary=300, budget=128, prompts=2)


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_a_case_is_full(name: str):
    case = CASES[name]
    owner = [i // case.group for i in range(case.prompts * case.group)]
    batches = pack(
        [[0] * case.prompt] * case.prompts,
        [[0] * case.new] * len(owner),
        prompt_of=owner,
        token_budget=case.budget,
    )
    assert {batch.plan.length for batch in batches} == {case.budget}


def test_a_measured_record_is_planned_anew_and_drawn(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(CASES, "tiny", TINY)
    peak = planned(TINY).peak
    row = {
        "name": "tiny",
        "settings": TINY.described(),
        "error": None,
        "phases": {"update": peak},
        "peak": peak,
    }
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"device": "this one", "commit": "abc", "cases": [row]}))
    assert memory.main(["--again", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["commit"] == "abc" and record["cases"][0]["ratio"] == 1.0
    assert "1 of 1 within" in capsys.readouterr().out and path.with_suffix(".png").stat().st_size > 1000
    row["peak"] = 2 * peak
    path.write_text(json.dumps({"device": "this one", "commit": "abc", "cases": [row]}))
    assert memory.main(["--again", "--output", str(path)]) == 1
