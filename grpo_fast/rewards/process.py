"""A reward function in a process of its own, which can be stopped: the trainer's side of `rewards/worker.py`.

Arguments go as JSON; a column that JSON would change (dates, bytes, arrays, tuples) goes pickled, which the worker
may load because the trainer wrote it. What comes back is JSON, of a limited size, and is looked at number by number.

The process leads a group of its own, and the whole group is killed when a call is over its time, when the process
died, and at the end. A child that made itself a group of its own escapes that, and so do children of a function whose
trainer was killed by SIGKILL; the worker itself dies then too.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo_fast.data.records import one_line
from grpo_fast.errors import UserError
from grpo_fast.rewards.user_function import FLOAT32_MAX, FunctionError, Keywords
from grpo_fast.rewards.worker import HEADER
from grpo_fast.typed import is_dict, is_list

GRACE_S = 0.5
"""From SIGTERM to SIGKILL."""
START_TRIES = 3
"""How often a worker that has run before is started again, with a pause that doubles."""
LARGEST_ANSWER = 1 << 26  # bytes
LARGEST_LOG = 1 << 20  # bytes
_NO_ANSWER = "sent what is no answer: it must leave the worker's pipes alone"
_PROGRAM = (
    "import json, sys; path, *rest = json.loads(sys.argv[1]); sys.path[:] = path\n"
    "from grpo_fast.rewards.worker import main; main(*rest)"
)
# The kernel ends a worker with the thread that started it, so that thread must be there as long as the trainer.
_STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-start")


class Worker:
    """The process of one function, started again when it died. Not for two threads at once, but for `close`."""

    def __init__(self, spec: str, *, timeout_s: float, memory_limit_gib: float = 0.0) -> None:
        """Starts the process; `ready` waits for it."""
        self.spec, self._timeout_s, self._memory_gib = spec, timeout_s, memory_limit_gib
        self.restarts = 0
        self.output = Output()
        self._closed = False
        self._busy = threading.Lock()
        self._folder = os.getcwd()
        self._end: weakref.finalize[..., Any] | None = None
        self._start()

    def ready(self) -> Keywords:
        """What the function takes; UserError where it cannot be loaded."""
        try:
            return self._hello()
        except FunctionError as error:
            problem = f"reward function {self.spec}: while its module was imported, it {error}{error.printed}"
            raise UserError(one_line(problem)) from None

    def call(
        self, given: dict[str, list[Any]], count: int, known: Sequence[str] | None, limit_s: float
    ) -> dict[str, list[float]]:
        """Objective name -> `count` numbers, NaN where one is missing.

        Raises `FunctionError` for what the function does wrong, its death and a call over `limit_s` included.
        """
        request = _request(self.spec, given) | {"count": count, "known": known}
        part = "" if limit_s >= self._timeout_s else f"{limit_s:g} s of "
        with self._busy:
            if not self._process.alive:
                self._restart()
            self.output.tail = b""
            late = f"took longer than {part}reward.timeout_s = {self._timeout_s:g} s"
            answer = self._exchange(request, limit_s, late)
        if "problem" in answer:
            problem = _readable(str(answer["problem"]).encode(errors="backslashreplace"))
            if problem.startswith("raised MemoryError") and self._memory_gib:
                problem += f" (reward.memory_limit_gib = {self._memory_gib:g})"
            raise FunctionError(problem, row=answer.get("names_row") is True, printed=self.output.last())
        return _checked(answer.get("scores"), count, known)

    def close(self) -> None:
        """End the process and its children, a call in another thread included."""
        self._closed = True
        if self._busy.locked():
            self._process.signal(signal.SIGKILL)
        with self._busy:
            self._process.end()
            self.output.close()

    def _start(self) -> None:
        if self._closed:
            raise UserError(f"reward function {self.spec}: the run has ended")
        limit = int(self._memory_gib * 2**30)
        self._process = _STARTER.submit(_Process, self.spec, limit, self._folder).result()
        if self._end is not None:
            self._end.detach()
        self._end = weakref.finalize(self, self._process.end)

    def _restart(self) -> None:
        self.restarts += 1
        for attempt in range(1, START_TRIES + 1):
            self._start()
            try:
                self._hello()
                return
            except (FunctionError, UserError):
                if attempt == START_TRIES:
                    raise
            time.sleep(0.1 * 2**attempt)

    def _hello(self) -> Keywords:
        limit = max(60.0, 10 * self._timeout_s)
        hello = self._exchange(None, limit, f"took longer than {limit:g} s")
        if "refused" in hello:
            self._process.end()
            raise UserError(_readable(str(hello["refused"]).encode(errors="backslashreplace")))
        taken, needed = hello.get("taken"), hello.get("needed")
        if not is_list(taken) or not is_list(needed):
            self._process.end()
            raise FunctionError(_NO_ANSWER)
        return Keywords(hello.get("every") is True, taken, needed)

    def _exchange(self, request: dict[str, Any] | None, limit_s: float, late: str) -> dict[str, Any]:
        """The answer to a request (None: to the start); ends the process unless there is one."""
        process = self._process
        try:
            data = b"" if request is None else json.dumps(request).encode()
            unsent = memoryview(HEADER.pack(len(data)) + data if data else b"")
            found = _converse(process, unsent, time.monotonic() + limit_s, self.output)
            if found is not None:
                answer = json.loads(found)
                if not is_dict(answer):
                    raise ValueError("no object")
                return answer
        except TimeoutError:
            process.end()
            raise FunctionError(late, printed=self.output.last()) from None
        except (ValueError, RecursionError):
            process.end()
            raise FunctionError(_NO_ANSWER) from None
        except BaseException:  # Ctrl-C: what is still to come would be taken for the next answer
            process.end()
            raise
        code = process.end()
        raise FunctionError(_death(code), printed=self.output.last())


class _Process:
    """A started process with its pipes."""

    def __init__(self, spec: str, memory_bytes: int, folder: str) -> None:
        theirs_in, self.requests = os.pipe()
        self.answers, theirs_out = os.pipe()
        arguments = [sys.path, spec, theirs_in, theirs_out, os.getpid(), memory_bytes]
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-u", "-c", _PROGRAM, json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,
                cwd=folder,
            )
        except OSError as error:
            for pipe in (self.requests, self.answers):
                os.close(pipe)
            raise UserError(f"cannot start a worker for reward function {spec}: {error.strerror}") from None
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        assert self._popen.stdout is not None
        self.printed = self._popen.stdout.fileno()
        for pipe in (self.requests, self.answers, self.printed):
            os.set_blocking(pipe, False)
        self.alive = True

    @property
    def exited(self) -> bool:
        """Whether the process has ended; it stays a zombie, so that its group's number is not given to another."""
        if not hasattr(os, "waitid"):  # macOS
            return self._popen.poll() is not None
        return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> int:
        """Kill the group, if that is still to do; the exit code, negative for a signal."""
        if not self.alive:
            return self._popen.returncode or 0
        self.alive = False
        os.close(self.requests)  # what waits for requests ends by itself
        deadline = time.monotonic() + GRACE_S
        if not self._waited(min(0.05, GRACE_S)):
            self.signal(signal.SIGTERM)
            self._waited(deadline - time.monotonic())
        self.signal(signal.SIGKILL)
        code = self._popen.wait()
        os.close(self.answers)
        assert self._popen.stdout is not None
        self._popen.stdout.close()
        return code

    def _waited(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.exited:
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
        return True

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)


def _converse(process: _Process, unsent: memoryview, deadline: float, output: Output) -> bytes | None:
    """Send, and read one message, whatever is printed meanwhile; None when the process died, TimeoutError if late.

    ValueError for a message that is too long.
    """
    got = bytearray()
    poll = select.poll()
    poll.register(process.answers, select.POLLIN)
    poll.register(process.printed, select.POLLIN)
    if unsent:
        poll.register(process.requests, select.POLLOUT)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            output.drain(process.printed)
            raise TimeoutError
        # A child of the function may hold the pipes open when the process has died, so that is looked at as well.
        ready = dict(poll.poll(min(left, 0.2) * 1000))
        if not ready and process.exited:
            return None
        if process.requests in ready:
            try:
                unsent = unsent[os.write(process.requests, unsent[: 1 << 16]) :]
            except BrokenPipeError:
                unsent = unsent[:0]
            except BlockingIOError:
                pass
            if not unsent:
                poll.unregister(process.requests)
        if process.printed in ready and not output.drain(process.printed, once=True):
            poll.unregister(process.printed)
        if process.answers in ready:
            part = os.read(process.answers, 1 << 16)
            got += part
            if not part:
                output.drain(process.printed)
                return None
            if len(got) >= HEADER.size:
                (size,) = HEADER.unpack_from(got)
                if size > LARGEST_ANSWER:
                    raise ValueError("too long")
                if len(got) >= HEADER.size + size:
                    output.drain(process.printed)
                    return bytes(got[HEADER.size : HEADER.size + size])


class Output:
    """What a function prints: the last of it, and a file of at most LARGEST_LOG bytes."""

    def __init__(self) -> None:
        self.tail = b""
        self._early = b""  # printed before there was a file
        self._path: Path | None = None
        self._written = 0

    def to(self, path: Path) -> None:
        """Write to this file from now on."""
        self._path = path
        with contextlib.suppress(OSError):
            self._written = path.stat().st_size
        early, self._early = self._early, b""
        self._write(early)

    def drain(self, pipe: int, *, once: bool = False) -> bool:
        """Take what the pipe holds (`once`: at most 64 KiB); False at its end."""
        for _ in range(1 if once else 64):
            try:
                data = os.read(pipe, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.tail = (self.tail + data)[-4096:]
            self._write(data)
        return True

    def last(self) -> str:
        """The last lines of the call, for a message."""
        lines = [line for line in _readable(self.tail).splitlines() if line.strip()][-2:]
        text = " / ".join(line.strip()[-80:] for line in lines)
        return f'; it printed "{text}"' if text else ""

    def close(self) -> None:
        """No more is written."""
        self._path = None

    def _write(self, data: bytes) -> None:
        if self._path is None:
            self._early = (self._early + data)[:LARGEST_LOG]
        elif data and self._written < LARGEST_LOG:
            text = _readable(data)[: LARGEST_LOG - self._written]
            self._written += len(data)
            if self._written >= LARGEST_LOG:
                text += f"\n(no more is written: the limit of {LARGEST_LOG >> 20} MiB is reached)\n"
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(text)


def _death(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    memory = code == -signal.SIGKILL
    return f"was killed by {name}" + (", which the system does when memory runs out" if memory else "")


def log_name(spec: str) -> str:
    """The name of the file for what a function prints."""
    return f"reward-{re.sub(r'[^A-Za-z0-9_.-]', '-', spec)}.log"


def _readable(data: bytes) -> str:
    """Text without control characters: they could rewrite a terminal that shows it."""
    text = data.decode(errors="backslashreplace").replace("\r\n", "\n")
    return "".join(x if x.isprintable() or x == "\n" else repr(x)[1:-1] for x in text)


def _request(spec: str, given: dict[str, list[Any]]) -> dict[str, Any]:
    plain = {name: column for name, column in given.items() if _is_plain(column)}
    pickled = {}
    for name in given.keys() - plain.keys():
        try:
            pickled[name] = base64.b64encode(pickle.dumps(given[name])).decode()
        except Exception as error:  # whatever an object's own pickling raises
            raise UserError(
                f"reward function {spec}: column {name!r} cannot be sent to another process "
                f"({type(error).__name__}); take --reward.isolation thread"
            ) from None
    return {"json": plain, "pickled": pickled}


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the value back as it is."""
    kind = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind in (str, float, bool, type(None)):
        return True
    if kind is int:
        return -(2**63) <= value < 2**64
    if kind is list:
        return all(map(_is_plain, value))
    return kind is dict and all(type(key) is str for key in value) and all(map(_is_plain, value.values()))


def _checked(scores: Any, count: int, known: Sequence[str] | None) -> dict[str, list[float]]:
    """The scores of an answer, which is not believed: the function could have written it itself."""
    if is_dict(scores) and scores and (known is None or scores.keys() == set(known)):
        columns = {name: _numbers(column, count) for name, column in scores.items() if name}
        found = {name: column for name, column in columns.items() if column is not None}
        if len(found) == len(scores):
            return found
    raise FunctionError(_NO_ANSWER)


def _numbers(column: Any, count: int) -> list[float] | None:
    if not is_list(column) or len(column) != count:
        return None
    numbers = [math.nan if item is None else item for item in column]
    good = all(type(x) is float and (x != x or abs(x) <= FLOAT32_MAX) for x in numbers)
    return numbers if good else None
