"""Rewards: the user's Python functions, the names of all objectives, and their signed weights.

A reward function is called as `f(prompts=[...], completions=[...], **columns)`: texts (of a chat the last message,
without template; the whole chats are in `messages`), and each other column of the data as a list, all of one
length S; it is given only the keywords it takes. It returns S numbers (one
objective, called like the function), a dict of name -> S numbers, or S dicts of name -> number. None is a
missing score. It may be a coroutine function.

Functions run in threads of this process, several at once. Python cannot stop a thread, so a function that
passes the time limit is left behind, the run ends with an error, and the thread, a daemon, ends with the
process. Threads overlap waiting (a server, a subprocess) and work that releases the interpreter lock; pure
Python work takes turns.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config.settings import RewardSettings
from grpo_fast.data.prompts import Messages, Row, as_messages
from grpo_fast.data.records import one_line
from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.rewards.overlong import OVERLONG
from grpo_fast.rewards.user_function import RewardFunction, described, load_function


class RewardFunctions:
    """The user's functions, run concurrently with a time limit for each.

    `names` is fixed by the first call (or `probe`): a dict's keys are known only then.
    """

    def __init__(self, specs: Sequence[str], *, timeout_s: float = 60.0, workers: int = 8) -> None:
        self._functions = [RewardFunction(spec, load_function(spec)) for spec in specs]
        self._timeout_s, self._workers = timeout_s, workers
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

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Sequence[dict[str, Any]]
    ) -> Tensor:
        """Scores of S completions: (S, len(names)) float32 on the CPU, NaN where one is missing.

        `columns` holds each completion's row. Raises `UserError` naming the function, and the completion
        where it is about one, when a function raises, takes too long, or returns anything else than it may.
        """
        assert len(prompts) == len(completions) == len(columns)
        if not self._functions:
            return torch.empty(len(prompts), 0)
        keys = dict.fromkeys(key for row in columns for key in row if key not in ("prompts", "completions"))
        arguments: dict[str, list[Any]] = {"prompts": list(prompts), "completions": list(completions)}
        arguments |= {key: [row.get(key) for row in columns] for key in keys}
        returned = self._run([function.bind(arguments) for function in self._functions])
        scores: dict[str, list[float]] = {}
        for function, value in zip(self._functions, returned, strict=True):
            for name, numbers in function.scores(value, len(prompts)).items():
                if name in scores:
                    raise UserError(
                        f"reward function {function.spec}: another function gives {name!r} already"
                    )
                scores[name] = numbers
        if self.names is None:
            self.names = list(scores)
        return torch.tensor([scores[name] for name in self.names], dtype=torch.float32).T.contiguous()

    def _run(self, calls: list[Callable[[], Any]]) -> list[Any]:
        """What each call returns; `workers` at a time, each with its own time limit from its start."""
        finished: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue()

        def work(index: int) -> None:
            try:
                with torch.no_grad():  # a thread does not inherit it
                    finished.put((index, calls[index](), None))
            except BaseException as error:  # SystemExit too: it would end the thread in silence
                finished.put((index, None, error))

        results: list[Any] = [None] * len(calls)
        waiting = list(range(len(calls)))
        deadlines: dict[int, float] = {}
        while waiting or deadlines:
            while waiting and len(deadlines) < self._workers:
                index = waiting.pop(0)
                deadlines[index] = time.monotonic() + self._timeout_s
                name = f"reward {self._functions[index].spec}"
                threading.Thread(target=work, args=(index,), name=name, daemon=True).start()
            first = min(deadlines, key=lambda index: deadlines[index])
            try:
                index, results[index], error = finished.get(
                    timeout=max(deadlines[first] - time.monotonic(), 0)
                )
            except queue.Empty:
                raise UserError(
                    f"reward function {self._functions[first].spec} took longer than "
                    f"reward.timeout_s = {self._timeout_s:g} s for one batch"
                ) from None
            del deadlines[index]
            if error is not None:
                spec = self._functions[index].spec
                raise UserError(one_line(f"reward function {spec} raised {described(error)}")) from error
        return results


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
