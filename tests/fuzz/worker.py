"""A process that attempts inputs and says on its output what it found; it may hang or die of one.

What it is at is always in `current`, so that whoever started it can keep the input that it died of.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.mutate import documents, mutated
from tests.fuzz.target import Target, attempt

MEMORY = 4 << 30
"""Bytes that inputs may make a worker grow by before an allocation fails."""
SAYS_EVERY_S = 0.5


def inputs(target: Target, name: str, number: int, base: int, first: int) -> Iterator[bytes]:
    """`number` inputs from place `first` on; a tenth, at the end, is made up by hypothesis."""
    corpus = target.corpus()
    invented = number // 10
    for place in range(first, number - invented):
        yield mutated(target.form, corpus, random.Random(f"{base} {name} {place}"))
    if first < number:
        made: list[bytes] = []

        @seed(base)
        @settings(
            max_examples=max(invented, 1),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        )
        @given(documents(target.form, corpus))
        def invent(data: bytes) -> None:
            made.append(data)

        invent()
        made += [
            mutated(target.form, corpus, random.Random(f"{base} {name} {-place}"))
            for place in range(1, invented + 1)
        ]
        yield from made[max(0, first - (number - invented)) : invented]


def work(
    targets: dict[str, Target], numbers: dict[str, int], base: int, first: int, scratch: Path, said: TextIO
) -> None:
    """Attempt everything, the first target from place `first` on; a line for every finding and for every target."""
    _limit_memory()
    outside = scratch / "outside"
    outside.mkdir(exist_ok=True)
    with (scratch / "current").open("wb", buffering=0) as current:
        for name, number in numbers.items():
            target, place, spoken = targets[name], first, time.monotonic()
            with tempfile.TemporaryDirectory(dir=outside, ignore_cleanup_errors=True) as inside:
                before = {*outside.iterdir()}  # a worker that died has left its own folder
                tell(said, target=name, begun=place)
                os.chdir(inside)
                for place, data in enumerate(inputs(target, name, number, base, first), start=first):
                    current.seek(0)
                    current.write(data)
                    current.truncate()
                    if problem := attempt(target, data, Path(inside)):
                        tell(said, target=name, problem=problem, data=data.hex())
                    if time.monotonic() - spoken > SAYS_EVERY_S:
                        spoken = time.monotonic()
                        tell(said, target=name, at=place)
                for path in {*outside.iterdir()} - before:
                    tell(said, target=name, problem=f"wrote outside its folder: {path.name}", data="")
                    path.unlink()
                os.chdir(scratch)
            tell(said, target=name, done=number)
            first = 0


def tell(said: TextIO, **what: object) -> None:
    """One line for the process that listens."""
    print(json.dumps(what), file=said, flush=True)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """`python -m tests.fuzz.worker '{"numbers": ..., "seed": 0, "first": 0, "scratch": ...}'`."""
    asked = json.loads(sys.argv[1])
    said = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is printed on the way is no message
    if asked.get("planted"):
        from tests.fuzz.planted import PLANTED as targets
    else:
        from tests.fuzz.model_targets import sound
        from tests.fuzz.targets import TARGETS as targets

        if any(name.startswith(("policy", "adapter", "reward.")) for name in asked["numbers"]):
            sound()  # before memory is limited
    work(targets, asked["numbers"], asked["seed"], asked["first"], Path(asked["scratch"]), said)


if __name__ == "__main__":
    main()
