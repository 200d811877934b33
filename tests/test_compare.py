"""Runs side by side: what differs and what came of it, whatever a run has left behind, and nothing of it as code."""

import json

import pytest

from grpo_fast import compare
from grpo_fast.report.compare_page import different_settings, outcomes, read_runs, render
from grpo_fast.run.follow import note_ending


def mean(value):
    return {"mean": value, "ci95": [value - 0.05, value + 0.05]}


def run(folder, name, *, lr=1e-4, after=0.9, steps=4, summary=True, note=""):
    path = folder / name
    path.mkdir()
    (path / "config.toml").write_text(
        f'name = "{name}"\nseed = 0\n[optim]\nlr = {lr}\n[policy]\nmodel = "{note}"\n'
    )
    rows = [
        {"phase": "grpo", "step": step, "reward/safety": 0.1 * step, "kl": 0.01 * step, "tokens_per_s": 100.0}
        for step in range(1, steps + 1)
    ]
    rows[-1]["eval/judge/safety"] = 0.7
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        objective = {
            f"{source}_{when}": mean(value)
            for source in ("reward", "judge")
            for when, value in (("before", 0.5), ("after", after), ("change", after - 0.5))
        }
        found = {"status": "finished", "steps": steps, "wall_s": 61.0, "objectives": {"safety": objective}}
        found["over_refusal"] = {"before": mean(0.25), "after": mean(0.05)}
        (path / "summary.json").write_text(json.dumps(found))
    return path


def test_what_differs_and_what_came_of_it(tmp_path):
    runs = read_runs([run(tmp_path, "a"), run(tmp_path, "b", lr=2e-4, after=0.7, steps=6)])
    assert different_settings(runs) == [("optim.lr", ["0.0001", "0.0002"])]
    found = dict(outcomes(runs))
    assert found["steps"] == ["4", "6"] and found["seconds"] == ["61", "61"]
    assert found["safety, judge"] == ["0.50 → 0.90 (+0.40 ± 0.05)", "0.50 → 0.70 (+0.20 ± 0.05)"]
    assert found["over-refusal"] == ["0.25 → 0.05"] * 2 and found["peak memory, GiB"] == ["–", "–"]
    page = render(runs)
    assert (
        page.count("<svg") == 3 and "0.50 → 0.70" in page
    )  # reward, KL, tokens a second; one evaluation is no curve


def test_a_run_that_goes_on_is_compared_as_far_as_it_is(tmp_path):
    runs = read_runs([run(tmp_path, "a"), run(tmp_path, "b", summary=False, steps=2)])
    found = dict(outcomes(runs))
    assert found["status"] == ["finished", "at step 2"] and found["safety, reward"][1] == "–"
    note_ending(tmp_path / "b", ValueError("no"))
    assert read_runs([tmp_path / "b"])[0].status == "failed at step 2"


def test_runs_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    names = [found.name for found in read_runs([run(tmp_path / "x", "a"), run(tmp_path / "y", "a")])]
    assert names == ["a", str(tmp_path / "y" / "a")]


def test_what_a_run_says_is_text(tmp_path, capsys):
    evil = "<script>alert(1)</script>[red]x"
    folders = [run(tmp_path, "a", note=evil), run(tmp_path, "b", note="\\u001b[31mred")]
    with pytest.raises(SystemExit) as stop:
        compare.main([*map(str, folders), "--output", str(tmp_path / "page.html")])
    page, shown = (tmp_path / "page.html").read_text(), capsys.readouterr().out
    assert stop.value.code == 0
    assert "<script>" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert "[red]x" in shown and "\x1b[31mred" not in shown


@pytest.mark.parametrize(
    "words, message",
    [
        (["a"], "two runs or more"),
        (["a", "a"], "named twice"),
        (["a", "missing"], "expected the folder of a run, found nothing"),
        (["a", "empty"], "found no config.toml"),
        (["a", "broken"], "not valid TOML"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.toml").write_text("= 3")
    with pytest.raises(SystemExit) as stop:
        compare.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
