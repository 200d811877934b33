"""From replies to ratings of four columns: a judge rates what people have not.

No public data set has the paper's four labels. Safety is what people said of a reply where they did (BeaverTails);
everything else is rated by a language model of the user's, by the rubrics in `rubrics.py`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paper.prepare import require_prepared
from benchmarks.paper.rubrics import OBJECTIVES, judge_settings, open_judges, require_judge, rubrics_hash
from benchmarks.paper.sample import own_replies
from benchmarks.paper.sources import chat
from grpo_fast.errors import UserError
from grpo_fast.run.metrics import read_rows, write_atomically

RECORD = "labelled.json"
AT_ONCE = 128  # replies; between two batches one line tells how far it is


def label(folder: Path, args: argparse.Namespace, *, dry_run: bool, tell: Callable[[str], None]) -> None:
    """Write ratings.jsonl. Answers are kept as they come: what was rated before an interruption is not asked again."""
    require_prepared(folder)
    rows = read_rows(folder / "replies.jsonl") + own_replies(folder)
    said = labelled(folder)
    if said is not None and said["replies"] == len(rows):
        tell(f"{folder} is labelled already, by {said['judge']}")
        return
    require_judge(args, "label")
    if said is not None and said["judge"] != getattr(args, "judge.model"):
        raise UserError(
            f"{folder} was labelled by {said['judge']}: two judges have two scales, so go on with that one"
        )
    cache = None if dry_run else folder / "judge-of-replies"
    unrated = {name: rubric for name, rubric in OBJECTIVES.items() if name != "safety"}
    judges = open_judges(
        [
            judge_settings(args, unrated, cache),
            judge_settings(args, {"safety": OBJECTIVES["safety"]}, cache),
        ]
    )
    try:
        asked = len(unrated) * len(rows) + sum(row["safety"] is None for row in rows)
        tell(f"{len(rows):,} replies, {asked:,} ratings")
        if dry_run:
            tell("Everything was checked; leave --dry-run out to start.")
            return
        rated: list[dict[str, Any]] = []
        for start in range(0, len(rows), AT_ONCE):
            batch = rows[start : start + AT_ONCE]
            own = [row for row in batch if row["safety"] is None]
            described, safe = (
                judge([row["prompt"] for row in some], [row["response"] for row in some]).tolist()
                for judge, some in zip(judges, (batch, own), strict=True)
            )
            safety = iter(safe)
            for row, scores in zip(batch, described, strict=True):
                given = dict(zip(unrated, scores, strict=True))
                given["safety"] = row["safety"] if row["safety"] is not None else next(safety)[0]
                labels = {
                    name: None if math.isnan(given[name]) else round(given[name], 6) for name in OBJECTIVES
                }
                rated.append(
                    {
                        "prompt": chat(row["prompt"]),
                        "response": row["response"],
                        **labels,
                        "source": row["source"],
                    }
                )
            tell(f"rated {len(rated):,} of {len(rows):,}")
    finally:
        for judge in judges:
            judge.close()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rated)
    write_atomically(folder / "ratings.jsonl", lines)
    said = {"judge": getattr(args, "judge.model"), "rubrics": rubrics_hash(), "replies": len(rated)}
    write_atomically(folder / RECORD, json.dumps(said, indent=1))
    tell(f"written: {folder / 'ratings.jsonl'}")


def labelled(folder: Path) -> dict[str, Any] | None:
    """Who labelled a folder's replies; None where nobody did."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def require_labelled(folder: Path) -> None:
    """UserError where there is nothing to train a reward model on."""
    require_prepared(folder)
    if labelled(folder) is None:
        raise UserError(
            f"{folder} has no ratings: python -m benchmarks.paper label --folder {folder} --judge.url URL "
            "--judge.model NAME, or bring a reward model with the four heads: run --reward-model FOLDER"
        )
