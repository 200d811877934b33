"""The process one reward function runs in: `main` answers the calls that `rewards/process.py` sends.

Requests and answers are JSON behind their length, on two pipes the function does not know of; what it prints goes to
the pipe that is its standard output, and its standard input is empty. Requests come from the trainer and may hold
pickled columns (see `rewards/process.py`). Answers are JSON numbers and texts alone, so that nothing a function does
can run code in the trainer. Started before torch is imported, and without it unless the function needs it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import math
import os
import pickle
import resource
import signal
import struct
import sys
from typing import Any

from grpo_fast.errors import UserError
from grpo_fast.rewards.user_function import FunctionError, RewardFunction, described

HEADER = struct.Struct(">Q")
"""Bytes of the message that follows."""
_PR_SET_PDEATHSIG = 1


def main(spec: str, requests: int, answers: int, trainer: int, memory_bytes: int) -> None:
    """Load the function, say what it takes, and answer calls until the trainer closes its end.

    `requests` and `answers` are file descriptors, `trainer` is the trainer's process id.
    """
    for pipe in (requests, answers):
        os.set_inheritable(pipe, False)  # a child of the function must not hold them open
    _end_with(trainer)
    # before the trainer itself, should memory run out
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if memory_bytes:  # not RLIMIT_AS: CUDA and memory pools reserve far more addresses than they use
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    sys.argv[1:] = []
    with open(requests, "rb") as incoming, open(answers, "wb") as outgoing:
        try:
            function = RewardFunction(spec)
        except UserError as error:
            _send(outgoing, {"refused": str(error)})
            return
        keywords = function.keywords
        _send(outgoing, {"every": keywords.every, "taken": keywords.taken, "needed": keywords.needed})
        while header := incoming.read(HEADER.size):
            request = json.loads(incoming.read(*HEADER.unpack(header)))
            _send(outgoing, _answer(function, request))


def _end_with(trainer: int) -> None:
    """The kernel kills this process when the thread that started it ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != trainer:  # it ended before
            os._exit(1)


def _send(outgoing: Any, message: dict[str, Any]) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the function may have closed or replaced them
            stream.flush()
    data = json.dumps(message).encode()
    outgoing.write(HEADER.pack(len(data)) + data)
    outgoing.flush()


def _answer(function: RewardFunction, request: dict[str, Any]) -> dict[str, Any]:
    given = request["json"]
    try:
        for name, data in request["pickled"].items():
            given[name] = pickle.loads(base64.b64decode(data))
        scores = function(given, request["count"], request["known"])
    except FunctionError as error:
        return {"problem": str(error), "names_row": error.names_row}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        return {"problem": f"raised {_safely_described(error)}", "names_row": False}
    numbers = {name: [None if math.isnan(x) else x for x in column] for name, column in scores.items()}
    return {"scores": numbers}


def _safely_described(error: BaseException) -> str:
    try:
        return described(error)[:1000]
    except BaseException:  # its own __str__ fails
        return type(error).__name__
