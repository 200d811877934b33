"""Notices that a process of the job has died or hangs, and says so once, whatever this one is waiting for.

Every process counts up a number of its own in the launcher's key-value store and reads the others'. A number that
stands still for SILENCE_S means a process that was killed, a machine that is gone, or an interpreter that is stuck; the
others, which wait for it in a collective, would wait for hours. Each process then ends, and one of them speaks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

INTERVAL_S = 1.0
SILENCE_S = 25.0
"""Longest a process may be silent; one that hangs has 30 s more from torchrun: within a minute in all."""
CLOSED_S = 4 * INTERVAL_S
"""How long to look who is silent after a connection was closed, before torchrun ends this process too."""
LOST = 1
"""Exit code of a process that has lost another."""


class Heartbeat:
    """A context manager around the work of one of `size` processes."""

    def __init__(
        self, rank: int, size: int, *, advice: Callable[[], str], silence_s: float = SILENCE_S
    ) -> None:
        """`advice` says, at the end of the message, how to go on."""
        self._rank, self._size, self._advice, self._silence_s = rank, size, advice, silence_s
        self._store = _store(size)
        self._ended = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._beat(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def claims(self) -> bool:
        """Whether this process is the first that has something to say about the end of the job."""
        try:
            return self._store.add("grpo_fast/said", 1) == 1
        except RuntimeError:
            return self._rank == 0

    def lost(self) -> str:
        """After a collective has failed: who is gone, in one line; empty where everybody is well."""
        before = {rank: self._read(rank) for rank in self._others()}
        time.sleep(CLOSED_S)
        silent = [rank for rank in self._others() if self._read(rank) == before[rank]]
        return self._message(silent, "") if silent else ""

    def farewell(self) -> None:
        """This process ends on purpose: its silence is nothing to worry about."""
        with suppress(RuntimeError):
            self._store.set(f"grpo_fast/ended/{self._rank}", "1")

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _beat(self, count: int) -> None:
        self._store.set(f"grpo_fast/beat/{self._rank}", str(count))

    def _read(self, rank: int) -> int:
        if self._store.check([f"grpo_fast/ended/{rank}"]):
            return -int(time.monotonic() * 1e6)  # never the same: it is not missed
        if not self._store.check([f"grpo_fast/beat/{rank}"]):
            return 0
        return int(self._store.get(f"grpo_fast/beat/{rank}"))

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(INTERVAL_S):
            count += 1
            try:
                self._beat(count)
                silent = self._silent()
            except (RuntimeError, ValueError):
                silent = [0]  # the store is on the first machine
            if silent and not self._ended.is_set():
                if self.claims():
                    print(f"error: {self._message(silent, f' for {self._silence_s:.0f} s')}", file=sys.stderr)
                    sys.stderr.flush()
                os._exit(LOST)  # the main thread may be inside a collective, which nothing interrupts

    def _silent(self) -> list[int]:
        now = time.monotonic()
        for rank in self._others():
            beat = self._read(rank)
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = (beat, now)
        return [rank for rank, (_, when) in self._heard.items() if now - when > self._silence_s]

    def _message(self, silent: list[int], how_long: str) -> str:
        who = ", ".join(map(str, silent))
        many = len(silent) > 1
        return (
            f"rank{'s' if many else ''} {who} of {self._size} gave no sign of life{how_long}: killed, out of "
            f"memory, or the machine is gone; {self._advice()}"
        )


def _store(size: int) -> Store:
    """A connection of our own to the job's store: the one that collectives use may be held by one of them."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=30))
