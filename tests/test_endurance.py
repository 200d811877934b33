"""Short forms of the proofs in `tests/endurance`."""

from pathlib import Path

import pytest
from rich.console import Console

from grpo_fast import train
from tests.endurance import disk, kills
from tests.endurance.kills import allowed
from tests.ranks import Forked


def forked(
    folder: Path, kind: str, name: str, *, resume: Path | None = None, disk: tuple[str, ...] = ()
) -> Forked:
    """As `kills.start`, without the seconds that imports take."""
    module, words, said = kills.words_of(folder, kind, name, resume, disk)
    return Forked(MAINS[module], words, said, folder=folder)


MAINS = {"grpo_fast.train": train.main, "tests.endurance.disk": disk.train}


@pytest.mark.slow
def test_a_run_that_is_killed_inside_a_save_comes_to_the_same(tmp_path):
    # on a slow disk, with the next batch under way
    quiet = Console(quiet=True)
    outcomes = kills.kills(tmp_path, 1, 3, ["ahead"], quiet, moments=("inside a save",), start=forked)
    assert all(outcome.identical and outcome.lost <= allowed(outcome) for outcome in outcomes), outcomes
