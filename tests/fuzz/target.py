"""What a fuzzer aims at, and one attempt at it."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_fast.errors import UserError
from grpo_fast.shown import LONGEST, plain_text


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser or loader."""

    run: Callable[[bytes, Path], Any]
    """Reads hostile bytes; may use the folder, which earlier inputs have used as well."""
    corpus: Callable[[], list[bytes]]
    """Sound inputs, from which hostile ones are made."""
    form: Literal["text", "json", "jsonl", "safetensors", "bytes"] = "text"
    errors: tuple[type[BaseException], ...] = (UserError,)
    """What it may raise; anything else is a finding."""
    share: float = 1.0
    """Of the usual number of inputs: slow loaders get fewer."""
    limit_s: float = 2.0


class Hang(BaseException):
    """An attempt passed its time limit; no `except Exception` stops it."""


def attempt(target: Target, data: bytes, folder: Path) -> str:
    """What is wrong with how the target took the input, empty where nothing is."""
    try:
        with within(target.limit_s):
            target.run(data, folder)
    except target.errors as error:
        return "" if isinstance(error, Hang) else wrong_message(error)
    except Hang as error:
        return f"hang: {error}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            frame for frame in frames if "/grpo_fast/" in frame.filename or "/benchmarks/" in frame.filename
        ]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        return f"{type(error).__name__} in {where}: {' '.join(repr(error).split())[:200]}"
    return ""


def wrong_message(error: BaseException) -> str:
    """What is wrong with a declared error's message: it must be one plain line of readable length."""
    text = str(error)
    if isinstance(error, UserError) and (
        plain_text(text, one_line=True) != text or not 0 < len(text) <= LONGEST + 10
    ):
        return f"message of {type(error).__name__} is not fit to be shown: {text[:80]!r}"
    return ""


@contextmanager
def within(limit_s: float) -> Iterator[None]:
    """`Hang` in a block that computes for longer, or waits ten times as long; the machine may have other work.

    The worker's parent sees what even that misses.
    """

    def stop(*_: object) -> None:
        raise Hang(f"longer than {limit_s:g} s")

    timers = {
        signal.SIGALRM: (signal.ITIMER_REAL, 10 * limit_s),
        signal.SIGPROF: (signal.ITIMER_PROF, limit_s),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
