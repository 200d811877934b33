"""The frame around a command that several processes run together: they meet, and they end with one message."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from grpo_fast.errors import UserError
from grpo_fast.parallel.heartbeat import LOST, Heartbeat
from grpo_fast.parallel.world import ALONE, World, join, world_size


@dataclass
class Ending:
    """What is said when a process of the job has died."""

    advice: str = ""
    """How to go on; empty until there is something to go on with."""
    note: Callable[[str], None] = lambda line: None
    """Keeps the line that is said, where there is a place for it."""

    def terminated(self, *_: object) -> None:
        """SIGTERM, where the run itself does not listen: before it begins it ends the process, afterwards nothing.

        The launcher sends it to the processes that are left when one has died, and these are about to say so.
        """
        if not self.advice:
            raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def job(device: torch.device) -> Generator[tuple[World, Ending], None, None]:
    """Around the whole work of one process; gives its place among the others, and the last words to be kept up to date.

    Alone nothing happens. On several processes a UserError is printed by the first that meets it and by no other, and a
    process that has died ends all of them (exit code 1) with one line.
    """
    ending = Ending()
    if world_size() == 1:
        yield ALONE, ending
        return
    signal.signal(signal.SIGTERM, ending.terminated)
    world = join(device)
    with Heartbeat(world.rank, world.size, advice=lambda: ending.advice or "start it again") as heartbeat:
        try:
            yield world, ending
            world.any(False)  # the first one may be writing its report yet: until then everybody is watched
        except UserError as error:
            if heartbeat.claims():
                print(f"error: {error}", file=sys.stderr)
            _leave(2)
        except Exception:
            lost = heartbeat.lost()
            if lost and world.is_first:
                ending.note(lost)
            if heartbeat.claims():
                print(f"error: {lost}" if lost else traceback.format_exc(), file=sys.stderr)
            _leave(LOST)
        heartbeat.farewell()
    world.any(False)  # rank 0 may hold the store: it leaves last
    dist.destroy_process_group()


def _leave(code: int) -> None:
    """At once: threads and libraries may wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
