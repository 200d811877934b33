"""A reward function that misbehaves in the way that the file `fault` beside it names; `faults.py` copies it."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

FAULT = Path(__file__).with_name("fault")


class Odd(Exception):
    def __str__(self):
        raise RuntimeError("no text either")


def recurse():
    return recurse()


def misbehave(kind, scores):
    """The scores, spoilt in this way."""
    if kind == "raises":
        raise ValueError("gone\n\x1b[31m")
    if kind == "raises without a text":
        raise Odd
    if kind == "raises KeyboardInterrupt":
        raise KeyboardInterrupt
    if kind == "recurses":
        recurse()
    if kind == "leaves":
        sys.exit(3)
    if kind == "exits":
        os._exit(0)
    if kind == "segfaults":
        ctypes.string_at(0)
    if kind == "aborts":
        os.abort()
    if kind == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "is terminated":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "sleeps":
        time.sleep(600)
    if kind == "loops":
        while True:
            pass
    if kind == "holds the interpreter":
        ctypes.PyDLL(None).sleep(600)
    if kind == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if kind == "locks itself":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    if kind == "takes all memory":
        bytearray(1 << 34)
    if kind == "prints without end":
        while True:
            print("\x1b[2J" * 1000)
    if kind == "leaves a child behind":
        if os.fork():
            os._exit(1)
        time.sleep(600)
    if kind == "closes everything":
        os.closerange(0, 100)
        return scores
    if kind == "writes to the trainer":
        for pipe in range(3, 20):
            with contextlib.suppress(OSError):
                os.write(pipe, b"\0" * 7 + b"\5[[[[[")
        return scores
    if kind == "gives NaN":
        return [float("nan")] * len(scores)
    if kind == "gives infinity":
        return [float("inf")] * len(scores)
    if kind == "gives a number too many":
        return [*scores, 1.0]
    if kind == "gives nothing":
        return None
    if kind == "gives texts":
        return ["1.0"] * len(scores)
    if kind == "gives lists":
        return [[1.0]] * len(scores)
    if kind == "gives other names":
        return {"other": scores}
    raise NotImplementedError(kind)


def counts_e(prompts, completions, **columns):
    """Prefers one letter; fails once, always, on some prompts, or gives none for those, as the file says."""
    scores = [sum(letter == "e" for letter in text) / 16 for text in completions]
    if not FAULT.exists():
        return scores
    how, kind = FAULT.read_text().split(":")
    hit = [prompt.endswith("3") for prompt in prompts]
    if how == "none":
        return [None if bad else score for bad, score in zip(hit, scores, strict=True)]
    if how == "some" and not any(hit):
        return scores
    if how == "once":
        FAULT.unlink()
    return misbehave(kind, scores)
