"""A few of the faults that `tests/endurance/faults.py` injects into training runs."""

from pathlib import Path

from tests.endurance.faults import engine_faults, function_faults, judge_faults, prepared


def test_a_fault_that_passes_changes_no_metric(tmp_path: Path) -> None:
    with prepared(tmp_path) as bench:
        names = ["truncated", "stale", "NaN", "hand-over: dies"]
        found = {
            "engine": engine_faults(bench, names, lasting=False),
            "function": function_faults(bench, ["raises", "segfaults", "loops", "gives NaN"], lasting=False),
            "judge": judge_faults(bench, ["500", "hangs up"], lasting=False),
        }
    results = [(name, result["once"]) for faults in found.values() for name, result in faults.items()]
    assert not [(name, result) for name, result in results if not result["held"]]
