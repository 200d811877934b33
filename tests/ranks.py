"""Functions and commands run on several processes at once, over gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grpo_fast.train import main

PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "transformers",
    "peft",
    "tests.tiny_models",
    "grpo_fast.train",
    "tensorboard.summary.writer.event_file_writer",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
]


def run_on_ranks(
    size: int, work: Callable[..., Any], *arguments: Any, device: str = "cpu", limit_s: float = 120.0
) -> list[Any]:
    """What `work(world, *arguments)` returns on each of `size` processes, in the order of ranks.

    `device` cuda: each has a GPU of its own, and they talk by NCCL.

    `work` is a function of a module; arguments and results are pickled. Processes come from a server that has imported
    what they need, so that a start costs little. AssertionError with the traceback where one fails.
    """
    context, port = _server(), _free_port()
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, device, work, arguments, answers), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, problem, result = answers.get(timeout=limit_s)
            assert not problem, f"rank {rank}:\n{problem}"
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=5 if len(results) == size else 0.1)
            process.kill()
    return [results[rank] for rank in range(size)]


def _rank(
    rank: int,
    size: int,
    port: int,
    device: str,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    answers: Any,
) -> None:
    from grpo_fast.parallel.world import join

    _place(rank, size, port)
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        world = join(torch.device(device, rank) if device == "cuda" else torch.device(device))
        answers.put((rank, "", work(world, *arguments)))
        world.any(False)
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))


def train_on_ranks(
    size: int,
    flags: Sequence[str | Path],
    said: Path,
    *,
    prepare: Callable[[int], None] | None = None,
    meanwhile: Callable[[list[int]], None] | None = None,
    limit_s: float = 60.0,
) -> tuple[list[int], str]:
    """(exit codes in the order of ranks, all that was said) of `grpo_fast.train` with `flags`.

    Each process works in this one's folder. `prepare`, a function of a module, is called in it with its rank before the
    command, and breaks something; `meanwhile` is called here with the process numbers. AssertionError where a process
    is still there after `limit_s`.
    """
    port = _free_port()
    processes = [
        Forked(main, flags, said, folder=Path.cwd(), before=partial(_as_rank, rank, size, port, prepare))
        for rank in range(size)
    ]
    try:
        if meanwhile is not None:
            meanwhile([process.pid for process in processes])
        deadline = time.monotonic() + limit_s
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        said_so_far = said.read_text(errors="replace")
        raise AssertionError(f"still there after {limit_s:g} s; said:\n{said_so_far}") from None
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
    return codes, said.read_text(errors="replace")


class Forked:
    """A command in a process forked from one that has imported what it needs; to be used as one of `subprocess`."""

    def __init__(
        self,
        command: Callable[[list[str]], None],
        words: Sequence[str | Path],
        said: Path,
        *,
        folder: Path,
        before: Callable[[], None] | None = None,
    ) -> None:
        """`command`, a function of a module, with `words`, in `folder`, from which it also imports.

        What it says is appended to `said`. `before` is called in the process first.
        """
        given = (command, [str(word) for word in words], str(said), str(folder), before)
        self._process = _server().Process(target=_command, args=given, daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Until it ends; subprocess.TimeoutExpired where it does not."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As long as it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _command(
    command: Callable[[list[str]], None],
    words: list[str],
    said: str,
    folder: str,
    before: Callable[[], None] | None,
) -> None:
    os.chdir(folder)
    sys.path.insert(0, folder)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    with suppress(KeyboardInterrupt):
        command(words)


def _as_rank(rank: int, size: int, port: int, prepare: Callable[[int], None] | None) -> None:
    from grpo_fast.parallel import heartbeat

    _place(rank, size, port)
    heartbeat.INTERVAL_S, heartbeat.CLOSED_S = 0.25, 1.0  # a fourth: tests wait for it
    if prepare is not None:
        prepare(rank)


def _server() -> Any:
    """Processes are forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _place(rank: int, size: int, port: int) -> None:
    """What torchrun tells a process, and one thread."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
