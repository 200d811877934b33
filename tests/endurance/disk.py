"""`grpo_fast.train` on a disk that is slow or full: `python -m tests.endurance.disk --slow S --full N -- FLAGS`.

`--slow`: each fsync takes S seconds longer. `--full`: the N-th file of checkpoints that is fsynced does not fit.
"""

import argparse
import errno
import os
import sys
import time

from grpo_fast.train import main


def train(words: list[str]) -> None:
    """Take what is before `--`, and hand the rest to the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--full", type=int, default=0)
    split = words.index("--")
    asked = parser.parse_args(words[:split])
    fsync, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        if "/.step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            calls += 1
            time.sleep(asked.slow)
            if calls == asked.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = failing
    main(words[split + 1 :])


if __name__ == "__main__":
    train(sys.argv[1:])
