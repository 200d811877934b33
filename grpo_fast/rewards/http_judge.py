"""A language model on the user's own server as a judge: each rubric is one objective.

The server speaks the OpenAI protocol (vLLM, SGLang, llama.cpp and Ollama do): `POST {url}/chat/completions`.
What cannot be had after all attempts ends the call with a `UserError`; nothing is scored 0 in its place. An
answer that holds no number on the scale is a missing score (NaN), and too many of them are an error as well.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config.settings import JudgeSettings
from grpo_fast.data.prompts import Messages
from grpo_fast.errors import UserError, did_you_mean
from grpo_fast.rewards.judge_answers import (
    AnswerCache,
    may_be_cut,
    parse_rating,
    rating_messages,
    request_key,
)
from grpo_fast.rewards.judge_client import JudgeClient

RECENT = 1 << 15  # requests that are remembered, so that one that comes again is not sent again
FEWEST_ANSWERS = 8  # of one call, before the share of unusable ones says anything


class HttpJudge:
    """Scores of completions by a judge's rubrics; `names` are the objectives, in the order of the columns.

    Threads wait for the server, `concurrency` at a time. They are daemons: a process that ends does not wait
    for requests under way.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        """Checks all that needs no server; raises `UserError` for settings that cannot work."""
        _check_settings(settings)
        self.names = list(settings.rubrics)
        self._settings = settings
        self._client = JudgeClient(
            settings.url,
            model=settings.model,
            api_key_env=settings.api_key_env,
            timeout_s=settings.timeout_s,
            retries=settings.retries,
            connections=settings.concurrency + 1,  # one for `check`
        )
        self._cache = AnswerCache(settings.cache, settings.model)
        self._lock = threading.Lock()
        self._cache_hits = self._unusable = 0
        self._last_unusable = ""
        self._recent: dict[str, Future[float]] = {}
        self._work: queue.SimpleQueue[tuple[Future[float], Callable[[], float]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start: `requests` sent for ratings, the `retries` among them, `cache_hits` (ratings
        that needed none) and `unusable` answers."""
        return {
            "requests": self._client.requests,
            "retries": self._client.retries,
            "cache_hits": self._cache_hits,
            "unusable": self._unusable,
        }

    def check(self) -> None:
        """Asks for the server's models and for one rating, before any long work.

        Raises `UserError` when the server does not answer, has no such model, or answers no number.
        """
        model = self._settings.model
        known = self._client.request("GET", "/models", None, _model_names)
        if model not in known and f"{model}:latest" not in known:  # Ollama's names may leave the tag out
            listed = ", ".join(self._client.shown(name) for name in known[:5]) or "none"
            hint = did_you_mean(model, [name for name in known if name.isprintable() and len(name) < 100])
            self._client.refuse(f"has no model {model!r}, its models are {listed}{hint}")
        answer, rating = self._ask(self._payload(self.names[0], "What is two and two?", "Four."))
        if rating is None:
            self._client.refuse(f"{model} answered {self._client.shown(answer)} {self._advice()}")

    def __call__(self, prompts: Sequence[str | Messages], completions: Sequence[str]) -> Tensor:
        """Scores of S completions: (S, R) float32 in [0, 1] on the CPU, NaN where an answer was unusable.

        Raises `UserError` when the server fails a request for good, and when more than half of at least
        `FEWEST_ANSWERS` answers are unusable.
        """
        rows: list[list[Future[float]]] = []
        try:
            for prompt, completion in zip(prompts, completions, strict=True):
                rows.append(self.submit(prompt, completion))
        except BaseException:
            _give_up(rows)
            raise
        return self.collect(rows)

    def collect(self, rows: list[list[Future[float]]]) -> Tensor:
        """Waits for what `submit` gave, one row a completion; result and errors as of a call."""
        try:
            waiting = [future for row in rows for future in row]
            wait(waiting, return_when=FIRST_EXCEPTION)
            for future in waiting:
                if future.done():
                    future.result()
            scores = [[future.result() for future in row] for row in rows]
        except CancelledError:
            self._client.refuse("a rating was given up, another call failed or closed the judge")
        finally:
            _give_up(rows)
        matrix = torch.tensor(scores, dtype=torch.float32).reshape(len(rows), len(self.names))
        unusable = int(matrix.isnan().sum())
        if matrix.numel() >= FEWEST_ANSWERS and unusable > matrix.numel() / 2:
            shown = self._last_unusable
            self._client.refuse(
                f"{unusable} of {matrix.numel()} answers unusable, as {shown} {self._advice()}"
            )
        return matrix

    def submit(self, prompt: str | Messages, completion: str) -> list[Future[float]]:
        """Ratings under way, one a rubric: [0, 1], NaN for an unusable answer, `UserError` for a failed request.

        A request that is among the last `RECENT` ones, answered or under way, is not sent again; then the
        futures are the same.
        """
        return [self._submit(self._payload(name, prompt, completion)) for name in self.names]

    def close(self) -> None:
        """Gives up what is waiting and closes connections and cache; requests under way are left behind."""
        self._closed = True
        while True:
            try:
                item = self._work.get_nowait()
            except queue.Empty:
                break
            if item is not None and item[0].cancel():
                item[0].set_running_or_notify_cancel()  # wakes the call that waits for it
        for _ in self._threads:
            self._work.put(None)
        self._client.close()
        self._cache.close()

    # ---- one rating ----

    def _payload(self, name: str, prompt: str | Messages, completion: str) -> dict[str, Any]:
        settings = self._settings
        return {
            "model": settings.model,
            "messages": rating_messages(name, settings.rubrics[name], settings.scale, prompt, completion),
            "temperature": 0,
            "max_tokens": settings.max_tokens,
            "seed": 0,
        }

    def _submit(self, payload: dict[str, Any]) -> Future[float]:
        assert not self._closed, "the judge is closed"
        key = request_key(payload)
        with self._lock:
            known = self._recent.get(key)
            if known is not None and not _failed(known):
                self._cache_hits += 1
                return known
            future: Future[float] = Future()
            self._recent.pop(key, None)
            self._recent[key] = future
            if len(self._recent) > RECENT:
                del self._recent[next(iter(self._recent))]
            rating = parse_rating(self._cache.get(key) or "", self._settings.scale)
            if rating is not None:
                self._cache_hits += 1
                future.set_result(rating)
                return future
            if len(self._threads) < self._settings.concurrency:
                self._threads.append(threading.Thread(target=self._serve, name="judge", daemon=True))
                self._threads[-1].start()
        self._work.put((future, lambda: self._rate(key, payload)))
        return future

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # the one who waits raises it
                future.set_exception(error)

    def _rate(self, key: str, payload: dict[str, Any]) -> float:
        answer, rating = self._ask(payload)
        if rating is None:
            with self._lock:
                self._unusable += 1
                self._last_unusable = self._client.shown(answer)
            return math.nan
        self._cache.put(key, answer.strip())
        return rating

    def _ask(self, payload: dict[str, Any]) -> tuple[str, float | None]:
        """The judge's answer and its rating, None where it holds none."""
        answer, cut = self._client.request("POST", "/chat/completions", payload, _answer)
        if cut and may_be_cut(answer):
            return answer, None
        return answer, parse_rating(answer, self._settings.scale)

    def _advice(self) -> str:
        low, high = self._settings.scale
        return (
            f"instead of one number from {low:g} to {high:g}: take a model that follows instructions, "
            "switch its thinking off, or raise judge.max_tokens"
        )


def _give_up(rows: list[list[Future[float]]]) -> None:
    """Cancels what a failed call still waits for; futures that are done stay as they are."""
    for future in [future for row in rows for future in row]:
        future.cancel()


def _failed(future: Future[float]) -> bool:
    return future.cancelled() or (future.done() and future.exception() is not None)


def _model_names(response: dict[str, Any]) -> list[str]:
    names = [model["id"] for model in response["data"]]
    if not all(isinstance(name, str) for name in names):
        raise TypeError
    return names


def _answer(response: dict[str, Any]) -> tuple[str, bool]:
    """The judge's text, and whether it ended at the token limit. A null content is an empty text."""
    choice = response["choices"][0]
    content = choice["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError
    return content or "", choice.get("finish_reason") == "length"


def _check_settings(settings: JudgeSettings) -> None:
    if not settings.model.strip():
        raise UserError("judge.model must name a model of the server, it is empty")
    if not settings.rubrics:
        raise UserError(
            "judge.rubrics is empty: name at least one objective and what it means to be good at it"
        )
    for name, rubric in settings.rubrics.items():
        if not name.strip() or not rubric.strip():
            raise UserError(f"judge.rubrics: objective {name!r} must have a name and a text, got {rubric!r}")
    low, high = settings.scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"judge.scale must be two finite numbers, the lower first, got {low:g} {high:g}")
    if not (math.isfinite(settings.timeout_s) and settings.timeout_s > 0):
        raise UserError(f"judge.timeout_s must be a positive number of seconds, got {settings.timeout_s:g}")
    for field, least in (("retries", 0), ("concurrency", 1), ("max_tokens", 1)):
        value = getattr(settings, field)
        if value < least:
            raise UserError(f"judge.{field} must be at least {least}, got {value}")
