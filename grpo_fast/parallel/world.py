"""The processes of a run: one, or as many as `torchrun` starts, each with a model shard and a share of the work.

What the processes tell each other here is small (completions, scores, metrics, decisions) and travels as bytes over
gloo, through the hosts. Gradients and weights have a process group of their own (`torch.distributed`'s default: NCCL
between CUDA devices, gloo between CPUs), which only the main thread uses.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.errors import Stopped, UserError
from grpo_fast.typed import integers

T = TypeVar("T")
_DONE, _PROBLEM, _STOPPED = b"d", b"p", b"s"

gather_into: Callable[..., Any] = next(
    getattr(dist, name) for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)
)
"""(gathered, own, group=): the name that this PyTorch has for it."""
COLLECTIVE_LIMIT = timedelta(hours=6)
"""For one collective. A dead rank is noticed by its missing heartbeat, long before; a slow one may take its time."""


@dataclass(frozen=True)
class World:
    """This process among `size`. Alone (the default) every method answers at once."""

    rank: int = 0
    size: int = 1
    generating: int = 1
    """The first so many of them generate completions"""
    _control: dist.ProcessGroup | None = field(default=None, repr=False)
    _aside: dist.ProcessGroup | None = field(default=None, repr=False)
    saving: dist.ProcessGroup | None = field(default=None, repr=False)
    """Of the thread that saves"""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def gather(self, message: bytes, *, aside: bool = False, saving: bool = False) -> list[bytes]:
        """Every rank's message, in the order of ranks; all ranks call it, in the same order.

        `aside`, `saving`: on the group of the thread that generates ahead, or that saves; collectives of several
        threads must not mix.
        """
        if self.size == 1:
            return [message]
        group = self._aside if aside else self.saving if saving else self._control
        lengths = torch.empty(self.size, dtype=torch.int64)
        gather_into(lengths, torch.tensor([len(message)]), group=group)
        longest = max(int(lengths.max()), 1)
        own = torch.zeros(longest, dtype=torch.uint8)
        if message:
            own[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        everyone = torch.empty(self.size * longest, dtype=torch.uint8)
        gather_into(everyone, own, group=group)
        rows = everyone.view(self.size, longest)
        return [rows[rank, :length].numpy().tobytes() for rank, length in enumerate(integers(lengths))]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(n_0 + n_1 + …, C) float64 on the CPU: every rank's rows (n_r, C), n_r whatever it is."""
        if self.size == 1:
            return rows.double().cpu()
        own = rows.double().cpu().contiguous()
        parts = self.gather(own.numpy().tobytes())
        tables = [torch.frombuffer(bytearray(part), dtype=torch.float64) for part in parts if part]
        return torch.cat(tables).view(-1, rows.shape[1]) if tables else own

    def any(self, flag: bool) -> bool:
        """Whether one of the ranks says so."""
        return any(answer == b"1" for answer in self.gather(b"1" if flag else b"0"))

    def first(self, work: Callable[[], Any], *, saving: bool = False) -> Any:
        """What `work` returns on rank 0 (it must survive JSON), on every rank; its UserError too."""
        return self.agreed(work if self.is_first else lambda: None, saving=saving)[0]

    def agreed(self, work: Callable[[], T], *, aside: bool = False, saving: bool = False) -> list[T]:
        """What `work` returns on each rank (it must survive JSON)."""
        if self.size == 1:
            return [work()]
        packed = self.exchanged(lambda: json.dumps(work()).encode(), aside=aside, saving=saving)
        return [json.loads(text) for text in packed]

    def exchanged(
        self, work: Callable[[], bytes], *, aside: bool = False, saving: bool = False
    ) -> list[bytes]:
        """What `work` returns on each rank; where one raises UserError, or was stopped, all are.

        So that no rank waits for another that has given up.
        """
        if self.size == 1:
            return [work()]
        try:
            answer = _DONE + work()
        except UserError as error:
            answer = _PROBLEM + str(error).encode()
        except (torch.OutOfMemoryError, MemoryError, OSError) as error:
            answer = _PROBLEM + f"{type(error).__name__}: {error}".encode()
        except Stopped:
            answer = _STOPPED
        answers = self.gather(answer, aside=aside, saving=saving)
        for rank, each in enumerate(answers):
            if each[:1] == _STOPPED:
                raise Stopped
            if each[:1] == _PROBLEM:
                problem = each[1:].decode()
                raise UserError(problem if rank == 0 else f"rank {rank}: {problem}", agreed=True)
        return [each[1:] for each in answers]

    def share(self, count: int) -> range:
        """Which of `count` prompts are this rank's to answer: a stretch, as long as the others' or one longer."""
        first, after = (
            min(rank, self.generating) * count // self.generating for rank in (self.rank, self.rank + 1)
        )
        return range(first, after)


ALONE = World()


def world_size() -> int:
    """How many processes the launcher has started; 1 without one."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int | None:
    """This process's number on its machine, under a launcher that started several; else None."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else None


def join(device: torch.device) -> World:
    """Meet the other processes of the job, which compute on devices like `device`. Alone: nothing happens.

    The launcher's variables (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`) say who they are.
    """
    size = world_size()
    if size == 1:
        return ALONE
    if _number("LOCAL_WORLD_SIZE", 0) == size:  # all on this machine: nothing needs to be heard outside it
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, timeout=COLLECTIVE_LIMIT, device_id=device if device.type == "cuda" else None
        )
    except (RuntimeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(
            f"the {size} processes of the job did not meet: {what[:300]}; start them with torchrun"
        ) from None
    groups: list[Any] = [
        dist.new_group(backend="gloo", timeout=COLLECTIVE_LIMIT)  # pyright: ignore[reportUnknownMemberType]
        for _ in range(3)
    ]
    return World(dist.get_rank(), size, size, *groups)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} = {text!r} in the environment must be a number; torchrun sets it") from None
