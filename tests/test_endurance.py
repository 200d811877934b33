"""Short forms of the proofs in `tests/endurance`."""

import pytest
from rich.console import Console

from tests.endurance.kills import allowed, kills


@pytest.mark.slow
def test_a_run_that_is_killed_inside_a_save_comes_to_the_same(tmp_path):
    # on a slow disk, with the next batch under way
    outcomes = kills(tmp_path, 1, 3, ["ahead"], Console(quiet=True), moments=("inside a save",))
    assert all(outcome.identical and outcome.lost <= allowed(outcome) for outcome in outcomes), outcomes
