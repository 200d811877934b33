"""Rewards: the user's Python functions, the names of all objectives, and their signed weights.

A reward function is called as `f(prompts=[...], completions=[...], **columns)`: texts (of a chat the last message,
without template; the whole chats are in `messages`), and each other column of the data as a list, all of one
length S; it is given only the keywords it takes. It returns S numbers (one
objective, called like the function), a dict of name -> S numbers, or S dicts of name -> number. None is a
missing score. It may be a coroutine function.

Each function runs in a process of its own (`process.py`), which is killed and started again when a call takes too
long or the process dies; what the function keeps in its module is lost then. With isolation `thread` it runs in this
process instead (`thread.py`): needed where it works on the trainer's own objects.

When a call fails, the rows it fails on are searched (`search.py`) by calling the function on parts of the batch. Scores
always come from one call on all rows that are not missing, so they do not depend on what had to be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config.settings import RewardSettings
from grpo_fast.data.prompts import Messages, Row, as_messages
from grpo_fast.data.records import one_line
from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.rewards.overlong import OVERLONG
from grpo_fast.rewards.process import Worker, log_name
from grpo_fast.rewards.search import Found, failing_rows
from grpo_fast.rewards.thread import InThread
from grpo_fast.rewards.user_function import FunctionError

MOST_LOST = 3
"""Batches in a row without any score of a function, after which a run stops that goes on without single ones."""


class RewardFunctions:
    """The user's functions, run concurrently with a time limit for each.

    `names` is fixed by the first call (or `probe`): a dict's keys are known only then.
    """

    def __init__(
        self,
        specs: Sequence[str],
        *,
        timeout_s: float = 60.0,
        workers: int = 8,
        memory_limit_gib: float = 0.0,
        isolation: str = "process",
        on_failure: str = "stop",
    ) -> None:
        """Loads the functions; the settings are those of `RewardSettings`.

        Raises `UserError` for a function that is not there or cannot be called.
        """
        self._timeout_s, self._workers = timeout_s, workers
        self._searches, self._forgives = isolation == "process", on_failure == "missing"
        self._runners: list[Worker | InThread] = []
        try:
            for spec in specs:
                if isolation == "thread":
                    self._runners.append(InThread(spec))
                else:
                    worker = Worker(spec, timeout_s=timeout_s, memory_limit_gib=memory_limit_gib)
                    self._runners.append(worker)
            self._keywords = [runner.ready() for runner in self._runners]
        except BaseException:
            self.close()
            raise
        self._names_of: list[list[str] | None] = [None] * len(specs)
        self._lost = [0] * len(specs)
        self._failures = [0] * len(specs)
        self._tell: Callable[[str], object] = lambda line: None
        self.names: list[str] | None = [] if not specs else None

    def probe(self, rows: Sequence[Row], *, system_prompt: str = "") -> list[str]:
        """Calls every function on up to two rows with a stand-in completion, and gives `names`.

        So that a function that fails does so before a model is loaded.
        """
        rows = rows[:2] or [Row("This stands for a prompt.", {}, "no row")]
        self(
            [row.plain for row in rows],
            ["This stands for a completion."] * len(rows),
            [with_messages(row.columns, as_messages(row.prompt, system_prompt)) for row in rows],
        )
        assert self.names is not None
        return self.names

    def attend(self, folder: Path | None, tell: Callable[[str], object]) -> None:
        """From now on what functions print goes to files in `folder`, and `tell` is given warnings."""
        self._tell = tell
        for runner in self._runners:
            if folder is not None and isinstance(runner, Worker):
                runner.output.to(folder / log_name(runner.spec))

    def counts(self) -> dict[str, float]:
        """Rows each function has failed on since the start, as metrics; nothing where a failure stops the run."""
        if not self._forgives:
            return {}
        pairs = zip(self._runners, self._failures, strict=True)
        return {f"reward_failures/{runner.spec}": float(number) for runner, number in pairs}

    def close(self) -> None:
        """End the functions' processes."""
        for runner in self._runners:
            runner.close()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Sequence[dict[str, Any]]
    ) -> Tensor:
        """Scores of S completions: (S, len(names)) float32 on the CPU, NaN where one is missing.

        `columns` holds each completion's row. Raises `UserError` naming the function, and the completion
        where it is about one, when a function raises, takes too long, dies, or returns anything else than it may;
        where such rows count as missing, only after `MOST_LOST` batches in a row without a score.
        """
        assert len(prompts) == len(completions) == len(columns)
        if not self._runners:
            return torch.empty(len(prompts), 0)
        keys = dict.fromkeys(key for row in columns for key in row if key not in ("prompts", "completions"))
        arguments: dict[str, list[Any]] = {"prompts": list(prompts), "completions": list(completions)}
        arguments |= {key: [row.get(key) for row in columns] for key in keys}
        given = [
            keywords.chosen(runner.spec, arguments)
            for runner, keywords in zip(self._runners, self._keywords, strict=True)
        ]
        places = range(len(self._runners))
        with ThreadPoolExecutor(max_workers=min(self._workers, len(places))) as pool:
            parts = list(pool.map(self._scores, places, given, repeat(prompts)))
        scores: dict[str, list[float]] = {}
        for runner, part in zip(self._runners, parts, strict=True):
            for name, numbers in part.items():
                if name in scores:
                    raise UserError(f"reward function {runner.spec}: another function gives {name!r} already")
                scores[name] = numbers
        self._names_of = [list(part) for part in parts]
        if self.names is None:
            self.names = list(scores)
        return torch.tensor([scores[name] for name in self.names], dtype=torch.float32).T.contiguous()

    def _scores(
        self, place: int, given: dict[str, list[Any]], prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        """The scores of one function, its failures dealt with."""
        runner, known, count = self._runners[place], self._names_of[place], len(prompts)

        def call(rows: list[int], limit_s: float) -> dict[str, list[float]]:
            chosen = {name: [column[row] for row in rows] for name, column in given.items()}
            return runner.call(chosen, len(rows), known, limit_s)

        def attempt(rows: list[int], limit_s: float) -> FunctionError | None:
            try:
                call(rows, limit_s)
            except FunctionError as error:
                return error
            return None

        try:
            scores = runner.call(given, count, known, self._timeout_s)
            self._lost[place] = 0
            return scores
        except FunctionError as error:
            first = error
        # while the functions are tried, a failure is plain
        if known is None or not self._searches:
            raise UserError(self._line(place, first)) from first
        found = Found()
        if self._forgives or not first.names_row:
            found = failing_rows(attempt, count, limit_s=self._timeout_s, first_only=not self._forgives)
        if found.rows and not self._forgives:
            row, problem = next(iter(found.rows.items()))
            raise UserError(self._line(place, problem, f"on completion {row} of {count}", prompts[row]))
        missing = {*found.rows, *found.undecided}
        kept = [row for row in range(count) if row not in missing]
        scores = {name: [torch.nan] * count for name in known}
        problem = next(iter(found.rows.values()), first)
        if found.undecided and not self._forgives:
            raise UserError(self._line(place, problem, "; on which completion was not found in time"))
        if kept:
            try:
                for name, numbers in call(kept, self._timeout_s).items():
                    for row, number in zip(kept, numbers, strict=True):
                        scores[name][row] = number
            except FunctionError as error:
                problem, kept = error, []
        if not kept and not self._forgives:
            raise UserError(
                self._line(place, problem, "" if problem.names_row else "(on no completion alone)")
            )
        self._account(place, problem, count - len(kept), count)
        return scores

    def _account(self, place: int, problem: FunctionError, missing: int, count: int) -> None:
        """Count and say what failed; UserError when it is too much."""
        if not missing:
            self._tell(self._line(place, problem, "and went well when it was called again", warning=True))
            return
        if not self._failures[place]:
            self._tell(self._line(place, problem, f": {missing} of {count} scores are missing", warning=True))
        self._failures[place] += missing
        self._lost[place] = self._lost[place] + 1 if missing == count else 0
        if self._lost[place] == MOST_LOST:
            raise UserError(
                self._line(place, problem, f"; no score in {MOST_LOST} batches in a row: mend the function")
            )

    def _line(
        self, place: int, problem: FunctionError, where: str = "", prompt: str = "", *, warning: bool = False
    ) -> str:
        """One line; the problem is cut before what stands behind it."""
        start = f"{'warning: ' * warning}reward function {self._runners[place].spec}"
        gap = " " if where[:1] not in ("", ":", ";") else ""
        end = f"{gap}{where}" + (f" (prompt {prompt[:40]!r})" if prompt else "")
        said, room = one_line(str(problem)), max(300 - len(start) - len(end), 40)
        said = said if len(said) < room else f"{said[: room - 2]}…"
        return one_line(f"{start} {said}{end}{problem.printed}")


def with_messages(columns: dict[str, Any], messages: Messages | None) -> dict[str, Any]:
    """A row's columns as functions see them: with the chat that was asked, where there is one."""
    return columns if messages is None else {"messages": messages, **columns}


# ---- objectives ----


def combine_names(
    heads: Sequence[str], rubrics: Sequence[str], functions: Sequence[str], overlong: bool = False
) -> list[str]:
    """The objectives in the order of the reward matrix: heads, rubrics, functions' names, the length's."""
    sources = {"a head of the reward model": heads, "a rubric": rubrics, "a reward function's": functions}
    sources["the length's (reward.overlong_buffer)"] = [OVERLONG] if overlong else []
    owner: dict[str, str] = {}
    for source, names in sources.items():
        for name in names:
            if owner.setdefault(name, source) != source:
                raise UserError(f"objective {name!r} is {owner[name]} and {source} too: rename one")
    return list(owner)


def objective_weights(names: Sequence[str], settings: RewardSettings, lower: Sequence[str] = ()) -> Tensor:
    """(R,) float32: each objective's weight, negated where its direction is `min`.

    `lower` are the objectives of which less is better unless the settings say otherwise.

    Without weights each counts 1. With weights, every objective must have one (0: reported, not trained).
    Raises `UserError` for a setting of no objective, and for an objective without weight.
    """
    for field in ("weights", "directions", "lower_bounds", "thresholds", "floors"):
        for name in getattr(settings, field):
            if name not in names:
                raise UserError(
                    f"reward.{field} names {name!r}, but the objectives are {', '.join(names) or 'none'}"
                    f"{did_you_mean(name, names)}"
                )
    missing = [name for name in names if settings.weights and name not in settings.weights]
    if missing:
        raise UserError(
            f"reward.weights has no {', '.join(missing)}: give each objective a weight (0: only reported)"
        )
    if settings.floors and not any(settings.weights.get(n, 1.0) for n in names if n not in settings.floors):
        raise UserError("reward.floors: no other objective has a weight, so there is nothing to maximise")
    default = dict.fromkeys(lower, "min")
    signs = [-1.0 if (default | settings.directions).get(name) == "min" else 1.0 for name in names]
    weights = [settings.weights.get(name, 1.0) for name in names]
    return torch.tensor(
        [sign * weight for sign, weight in zip(signs, weights, strict=True)], dtype=torch.float32
    )
