"""The independent judge: four objectives, attacks that succeed, refusals that should not be.

Each question goes to the prompts it makes sense for: `attack_success` to harmful ones, `refusal` to borderline and
benign ones, the objectives to all. Letters: n prompts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.rubrics import COMPLIANCE, OBJECTIVES, REFUSAL, YES, judge_settings, open_judges
from benchmarks.paper.sources import Kind
from grpo_fast.rewards.http_judge import HttpJudge

AT_ONCE = 256  # prompts between two lines that tell how far it is


@dataclass(frozen=True, kw_only=True)
class Question:
    """Rubrics and the kinds of prompts they are asked for."""

    rubrics: dict[str, str]
    kinds: tuple[Kind, ...]
    yes_or_no: bool


QUESTIONS = (
    Question(rubrics=OBJECTIVES, kinds=("harmful", "borderline", "benign"), yes_or_no=False),
    Question(rubrics=COMPLIANCE, kinds=("harmful",), yes_or_no=True),
    Question(rubrics=REFUSAL, kinds=("borderline", "benign"), yes_or_no=True),
)


def ratings_needed(kinds: Sequence[str]) -> int:
    """Ratings of one set of completions to prompts of these kinds."""
    return sum(len(q.rubrics) * sum(kind in q.kinds for kind in kinds) for q in QUESTIONS)


class Jury:
    """One judge a question, on one server; a context manager. Checked with the server when it is made."""

    def __init__(self, args: argparse.Namespace, cache: Path | None) -> None:
        """`cache` is a folder that keeps every answer: what was rated before an interruption is not asked again."""
        self._judges = open_judges(
            [judge_settings(args, q.rubrics, cache, yes_or_no=q.yes_or_no) for q in QUESTIONS]
        )

    def __enter__(self) -> Jury:
        return self

    def __exit__(self, *_: object) -> None:
        for judge in self._judges:
            judge.close()

    def __call__(
        self,
        prompts: Sequence[str],
        kinds: Sequence[str],
        completions: Sequence[str],
        tell: Callable[[int], None],
    ) -> dict[str, Tensor]:
        """{rubric: n answers, float64}: scores in [0, 1], 0 or 1 for yes-or-no rubrics; NaN where a rubric is not
        asked or its answer was unusable. `tell` is given how many completions are done."""
        n = len(prompts)
        found = {
            name: torch.full((n,), math.nan, dtype=torch.float64) for q in QUESTIONS for name in q.rubrics
        }
        for start in range(0, n, AT_ONCE):
            for question, judge in zip(QUESTIONS, self._judges, strict=True):
                places = [i for i in range(start, min(start + AT_ONCE, n)) if kinds[i] in question.kinds]
                answers = _asked(judge, [prompts[i] for i in places], [completions[i] for i in places])
                for column, name in enumerate(question.rubrics):
                    given = answers[:, column]
                    if question.yes_or_no:
                        given = torch.where(given.isnan(), given, (given >= YES).double())
                    found[name][places] = given
            tell(min(start + AT_ONCE, n))
        return found


def _asked(judge: HttpJudge, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    return judge(prompts, completions).double()
