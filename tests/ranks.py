"""Functions run on several processes at once, over gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
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

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        world = join(torch.device(device, rank) if device == "cuda" else torch.device(device))
        answers.put((rank, "", work(world, *arguments)))
        world.any(False)
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
