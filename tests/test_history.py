"""The benchmark suite's history: a slowed copy is found, noise is not, other machines are said."""

import copy
import json
import random
from pathlib import Path

import pytest

from benchmarks import history
from benchmarks.compare import ANCHOR, Change, compare, differences, merged, spread, thinned
from grpo_fast.errors import UserError

MACHINE = {"device": "a CPU", "cores": 2, "threads": 1, "clock": "wall", "versions": {"torch": "2"}}
MEDIANS = {ANCHOR: 0.02, "t::fast": 0.001, "t::slow": 0.3, "t::drifting": 0.05}
DRIFT = {"t::drifting": 0.25}
"""How far a test's repeats lie apart, beside 2% of all."""


def made(seed: int, *, factor: dict[str, float] | None = None, machine: dict | None = None) -> dict:
    """A run of four tests, three repeats each, with rounds 3% apart; `factor` times as slow where it says so."""
    draw = random.Random(seed)
    tests = {}
    for name, median in MEDIANS.items():
        repeats = []
        for _ in range(3):
            drifted = median * (factor or {}).get(name, 1.0)
            drifted *= 1 + draw.uniform(-1, 1) * DRIFT.get(name, 0.01)
            repeats.append([drifted * draw.gauss(1, 0.03) for _ in range(10)])
        tests[name] = {"median_s": median, "repeats": repeats}
    return {"machine": machine or MACHINE, "commit": "abc", "date": "today", "tests": tests}


def verdicts(changes: list[Change]) -> dict[str, str]:
    return {change.name: change.verdict for change in changes}


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_change(seed):
    assert set(verdicts(compare(made(0), made(seed + 1))).values()) == {"same"}


def test_a_slowed_copy_is_found_and_only_it():
    changes = compare(made(0), made(1, factor={"t::slow": 1.2, "t::fast": 0.7}))
    assert verdicts(changes) == {
        ANCHOR: "same",
        "t::fast": "faster",
        "t::slow": "slower",
        "t::drifting": "same",
    }
    slow = changes[2]
    assert slow.ratio == pytest.approx(1.2, rel=0.05) and slow.ci95 and slow.ci95[0] > 1.1
    assert slow.noise is not None and 0.05 <= slow.noise < 0.1


def test_what_varies_by_itself_needs_a_larger_change():
    baseline = made(0)
    assert spread(baseline["tests"]["t::drifting"]) > 0.1
    by_little = compare(baseline, made(1, factor={"t::drifting": 1.1}))
    by_much = compare(baseline, made(1, factor={"t::drifting": 2.0}))
    assert verdicts(by_little)["t::drifting"] == "same" and verdicts(by_much)["t::drifting"] == "slower"


def test_another_machine_is_said_and_compared_by_the_bare_products():
    other = MACHINE | {"device": "another CPU"}
    twice = dict.fromkeys(MEDIANS, 2.0)
    run = made(1, factor=twice, machine=other)
    assert differences(made(0), run) == ["device another CPU here, a CPU in the baseline"]
    assert set(verdicts(compare(made(0), run)).values()) == {"same"}
    worse = made(1, factor=twice | {"t::slow": 3.0}, machine=other)
    assert verdicts(compare(made(0), worse))["t::slow"] == "slower"
    # on the same machine the same seconds are slower, every one of them
    assert set(verdicts(compare(made(0), made(1, factor=twice))).values()) == {"slower"}
    del worse["tests"][ANCHOR]
    with pytest.raises(ValueError, match="different machines"):
        compare(made(0), worse)


def test_tests_that_come_and_go():
    run = made(1)
    run["tests"]["t::later"] = run["tests"].pop("t::fast")
    found = verdicts(compare(made(0), run))
    assert found["t::fast"] == "gone" and found["t::later"] == "new"


def test_few_samples_stand_for_all():
    samples = [i / 1000 for i in range(1, 1001)]
    few = thinned(random.Random(0).sample(samples, 1000))
    assert len(few) == 12 and few[0] == 0.001 and few[-1] == 1.0 and few == sorted(few)
    assert abs(merged({"repeats": [few]})[6] - 0.5) < 0.06
    assert thinned([0.123456]) == [0.1235]


def fake(monkeypatch, *runs: dict) -> list[list[str]]:
    """`measure` gives these, one after the other; what it was asked for."""
    asked, left = [], list(runs)

    def measure(suite, *, only=(), **_):
        asked.append(list(only))
        run = copy.deepcopy(left.pop(0))
        if only:
            run["tests"] = {name: test for name, test in run["tests"].items() if name in only}
        return run

    monkeypatch.setattr(history, "measure", measure)
    return asked


def test_what_is_slower_twice_fails_and_what_is_once_does_not(tmp_path, monkeypatch, capsys):
    (tmp_path / "baseline.json").write_text(json.dumps(made(0)))
    slowed = {"t::slow": 1.3}
    asked = fake(monkeypatch, made(1, factor=slowed), made(2, factor=slowed))
    assert history.main(["--folder", str(tmp_path), "--save"]) == 1
    out = capsys.readouterr().out
    assert asked[1] == ["t::slow", ANCHOR]
    assert "1 slower, 3 same" in out and out.index("t::slow") < out.index("t::fast")
    page = (tmp_path / "report.html").read_text()
    assert page.index("t::slow") < page.index("t::fast") and "<dd>a CPU</dd>" in page
    [line] = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert set(json.loads(line)["median_and_quartiles_s"]) == set(MEDIANS) and len(line) < 1000
    fake(monkeypatch, made(1, factor=slowed), made(2))
    assert history.main(["--folder", str(tmp_path)]) == 0
    assert "4 same" in capsys.readouterr().out
    fake(monkeypatch, made(1, machine=MACHINE | {"threads": 4, "versions": {"torch": "3"}}))
    assert history.main(["--folder", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Not the baseline's conditions (threads 4 here, 1 in the baseline)" in said
        and "torch 3 here, 2" in said
    )


SUITE = """
import time
def test_sleep(benchmark):
    benchmark(time.sleep, 0.001)
def test_steady(benchmark):
    benchmark(time.sleep, 0.03)
"""


def test_a_baseline_is_measured_and_compared_with(tmp_path, capsys):
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    flags = ["--suite", str(suite), "--folder", str(tmp_path / "history"), "--clock", "wall"]
    assert history.main([*flags, "--baseline", "--repeats", "2"]) == 0
    text = (tmp_path / "history" / "baseline.json").read_text()
    test, steady = json.loads(text)["tests"].values()
    assert (
        len(steady["repeats"]) == 2
        and len(test["repeats"]) == 2
        and all(0.001 <= sample < 1 for sample in merged(test))
    )
    assert len(text) < 2000
    suite.write_text(SUITE.replace("0.001", "0.02"))
    assert history.main([*flags, "--repeats", "1"]) == 1
    assert "1 slower, 1 same" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path):
    folder = ["--folder", str(tmp_path)]
    with pytest.raises(UserError, match="no baseline to compare with"):
        history.main(folder)
    (tmp_path / "baseline.json").write_text("{}")
    with pytest.raises(UserError, match="is no baseline"):
        history.main(folder)
    with pytest.raises(UserError, match="--threads must be at least 1"):
        history.main([*folder, "--threads", "0"])
    with pytest.raises(UserError, match="did you mean --baseline"):
        history.main(["--baselime"])
    broken = tmp_path / "test_broken.py"
    broken.write_text("def test_x(benchmark):\n    assert False\n")
    with pytest.raises(UserError, match=r"the suite did not run through: .*test_x"):
        history.measure([str(broken)], repeats=1, threads=1, clock="wall")


def test_the_committed_baseline_knows_every_test_of_the_suite():
    baseline = history.read_baseline(history.FOLDER / history.BASELINE)
    assert ANCHOR in baseline["tests"]
    names = {name.partition("[")[0] for name in baseline["tests"]}
    for path in sorted(Path(history.ROOT / "benchmarks").glob("test_*.py")):
        defined = [
            line.split("(")[0][4:] for line in path.read_text().splitlines() if line.startswith("def test_")
        ]
        assert defined and {f"benchmarks/{path.name}::{name}" for name in defined} <= names
