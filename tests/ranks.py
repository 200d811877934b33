"""Functions and commands run on several processes at once, over gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "transformers",
    "peft",
    "tests.tiny_models",
    "grpo_fast.train",
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
) -> tuple[list[int | None], str]:
    """(exit codes in the order of ranks, all that was said) of `grpo_fast.train` with `flags`.

    Each process works in this one's folder. `prepare`, a function of a module, is called in it with its rank before the
    command, and breaks something; `meanwhile` is called here with the process numbers. AssertionError where a process
    is still there after `limit_s`.
    """
    context, port = _server(), _free_port()
    words = [str(flag) for flag in flags]
    processes = [
        context.Process(
            target=_train, args=(rank, size, port, os.getcwd(), words, str(said), prepare), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        if meanwhile is not None:
            meanwhile([process.pid or 0 for process in processes])
        deadline = time.monotonic() + limit_s
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    text = said.read_text(errors="replace")
    assert None not in codes, f"exit codes {codes} after {limit_s:g} s; said:\n{text}"
    return codes, text


def _train(
    rank: int,
    size: int,
    port: int,
    folder: str,
    words: list[str],
    said: str,
    prepare: Callable[[int], None] | None,
) -> None:
    from grpo_fast.parallel import heartbeat
    from grpo_fast.train import main

    os.chdir(folder)
    sys.path.insert(0, folder)
    _place(rank, size, port)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    heartbeat.INTERVAL_S, heartbeat.CLOSED_S = 0.25, 1.0  # a fourth: tests wait for it
    if prepare is not None:
        prepare(rank)
    with suppress(KeyboardInterrupt):
        main(words)


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
