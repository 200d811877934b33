"""What a contender holds and what it needs on top, measured in a process of its own.

The process warms up on a world so small that it leaves nothing, builds what the contender uses, sets its high-water
mark back, and does the work once; freed memory stays with the process, as in training.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.ablations.contenders import CONTENDERS
from benchmarks.ablations.work import WARM_UP, Scale, World
from benchmarks.machine import forget_peak, resident


def measure(names: Sequence[str], scale: Scale, *, repeats: int) -> dict[str, dict[str, Any]]:
    """{contender: {"held_bytes", "extra_bytes"} (medians), "samples" and "error"}, contenders in turns.

    `held`: models and, of the optimizer, gradients; `extra`: the most that one call needs beyond them, gradients
    included.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {name: {"error": "needs Linux's /proc/self/clear_refs", "samples": []} for name in names}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.ablations.contenders"])  # libraries are read in once
    found: dict[str, dict[str, Any]] = {name: {"error": None, "samples": []} for name in names}
    for repeat in range(repeats):
        for name in names:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(name, scale, there))
            process.start()
            there.close()
            try:
                answer = here.recv()
            except EOFError:
                answer = {"error": "its process ended"}
            process.join()
            if "error" in answer:
                found[name]["error"] = answer["error"]
            else:
                found[name]["samples"].append(answer)
        print(f"  memory, round {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
    for row in found.values():
        for key in ("held_bytes", "extra_bytes"):
            if row["samples"]:
                row[key] = statistics.median(sample[key] for sample in row["samples"])
    return found


def _send(name: str, scale: Scale, link: Connection) -> None:
    try:
        link.send(once(name, scale))
    except Exception as error:  # the others go on
        link.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def once(name: str, scale: Scale) -> dict[str, int]:
    """One measurement, in this process."""
    from grpo_fast.run.command import prepare_libraries

    prepare_libraries(1)
    CONTENDERS[name](World(WARM_UP)).run()
    gc.collect()
    before = resident("VmRSS")
    contender = CONTENDERS[name](World(scale))
    gc.collect()
    held = resident("VmRSS")
    forget_peak()
    contender.run()
    return {"held_bytes": max(0, held - before), "extra_bytes": max(0, resident("VmHWM") - held)}
