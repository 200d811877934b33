"""The report says what the files say, and nothing in them can act on its reader."""

import html
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo_fast.errors import UserError
from grpo_fast.report.charts import Series, line_chart, stacked_chart, tick_text, ticks
from grpo_fast.report.page import main, write_report
from grpo_fast.report.template import figure, interval, signed
from grpo_fast.run.command import run_command

NAMES = ["safety", "tone"]
HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31m\u202e'\"{{ 7*7 }}&amp;\x00"


def measured(rng: random.Random, low: float = 0.0, high: float = 1.0) -> dict:
    mean = rng.uniform(low, high)
    return {"mean": mean, "ci95": [mean - rng.random() / 20, mean + rng.random() / 20]}


def objective(rng: random.Random, judge: bool) -> dict:
    keys = [f"{source}_{when}" for source in ("reward", "judge") for when in ("before", "after")]
    entry: dict = {key: measured(rng) for key in keys} | {"weight": 1.5}
    entry |= {f"{source}_change": measured(rng, -1, 1) for source in ("reward", "judge")}
    return (
        entry if judge else {key: None if key.startswith("judge") else value for key, value in entry.items()}
    )


def synthetic_run(run: Path, *, steps: int = 12, judge: bool = True) -> dict:
    """A finished run's files with random figures; returns its summary."""
    rng = random.Random(0)
    run.mkdir(parents=True)
    rows = [{"phase": "warm_start", "step": s, "time_s": s, "loss": 3 / s} for s in (1, 2, 3)]
    for step in range(1, steps + 1):
        row: dict = {"phase": "grpo", "step": step, "time_s": step, "kl": 0.01 * step, "novel_metric": step}
        for name in NAMES:
            row |= {
                f"reward/{name}": rng.random(),
                f"reward_sem/{name}": 0.02,
                f"group_std/{name}": rng.random(),
            }
            row |= {f"eval/judge/{name}": 0.5} if judge and step % 4 == 0 else {}
        row |= {
            "loss": None if step == 3 else 0.1,
            "entropy": 1.0,
            "grad_norm": 2.0,
            "lr": 1e-6,
            "memory_gib": 1.0,
        }
        rows.append(row | {"time/generate_s": 0.5, "time/update_s": 0.3, "time/step_s": 0.9})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = []
    for when in ("before", "after"):
        for i in range(9):
            prompt = HOSTILE if i == 1 else f"prompt {i}"
            samples.append(
                {
                    "when": when,
                    "step": 0 if when == "before" else steps,
                    "prompt": prompt,
                    "completion": f"{when} reply {i} {HOSTILE}",
                    "scores": {name: rng.random() for name in NAMES},
                    "judge": {name: rng.random() for name in NAMES} if judge else None,
                    "kind": ["harmful", "benign", None][i % 3],
                    "finish_reason": "length" if i == 2 else "stop",
                }
            )
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    summary = {
        "name": run.name,
        "status": "finished",
        "wall_s": 185.0,
        "phase_s": {"generate": 100.0, "update": 60.0},
        "tokens_per_s": 12345.6,
        "peak_memory_gib": 1.25,
        "steps": steps,
        "seed": 7,
        "objectives": {name: objective(rng, judge) for name in NAMES},
        "mean_judge_change": measured(rng, -1, 1) if judge else None,
        "over_refusal": {key: measured(rng, -1, 1) for key in ("before", "after", "change")}
        if judge
        else None,
        "prompts": 96,
        "reward_model": {
            name: {"mae": rng.random(), "pearson": None, "spearman": 0.9, "n": 321} for name in NAMES
        },
        "environment": {"torch": "9.9.9", "device": f"cpu {HOSTILE}"},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.toml").write_text(f'name = "{html.escape(HOSTILE)}"\n# {HOSTILE}\nseed = 7\n')
    return summary


class Page(HTMLParser):
    """Everything a test asks of a page: tags, attributes, and text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "line", "circle", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def said(self, *tags: str) -> str:
        return " ".join(data for tag, data in self.text if not tags or tag in tags)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    return run, synthetic_run(run), Page(write_report(run).read_text())


def test_every_figure_of_the_summary_is_in_the_text(run):
    _, summary, page = run
    said = page.said("b", "small", "td")
    for name, entry in summary["objectives"].items():
        assert name in page.said("th")
        for key in ("reward_before", "reward_after", "judge_before", "judge_after"):
            assert figure(entry[key]["mean"]) in said and interval(entry[key]) in said
        for key in ("reward_change", "judge_change"):
            assert signed(entry[key]["mean"]) in said and interval(entry[key], True) in said
    for key in ("before", "after"):
        assert figure(summary["over_refusal"][key]["mean"]) in said
        assert interval(summary["over_refusal"][key]) in said
    assert signed(summary["over_refusal"]["change"]["mean"]) in said
    assert signed(summary["mean_judge_change"]["mean"]) in said
    assert interval(summary["mean_judge_change"], True) in page.said()
    for head in summary["reward_model"].values():
        assert figure(head["mae"]) in said
    for text in ("96", "12.3k", "1.25 GiB", "3 min 05 s"):
        assert text in page.said("b")
    assert "–" in said and "321" in said and "9.9.9" in page.said("dd")


def test_figures_are_rounded_not_changed():
    assert figure(0.12345) == "0.123" and figure(-0.0004) == "0.000" and figure(None) == "–"
    assert signed(0.25) == "+0.250" and signed(-0.25) == "−0.250" and signed(0.0001) == "0.000"
    assert interval({"ci95": [-0.1, 0.2]}, True) == "−0.100 to +0.200" and interval(None) == ""


def test_nothing_in_a_run_becomes_markup(run):
    _, _, page = run
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "link", "a", "form", "base"}
    for _, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "href", "xlink:href")]
    assert page.open == [] and sum(tag == "style" for tag, _ in page.tags) == 1
    text = page.said()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "<script>alert(1)</script>" in text and "{{ 7*7 }}" in text  # shown, as text
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "http" not in page.said("style") and "url(" not in page.said("style")


def test_the_page_shows_the_same_prompts_before_and_after(run):
    _, _, page = run
    text = page.said("div")
    assert all(f"{when} reply {i}" in text for when in ("before", "after") for i in range(9))
    assert page.said("summary").count("more") >= 1
    assert "cut at the length limit" in page.said("small")
    assert "novel_metric" in page.said("b")


def test_charts_are_well_formed(run):
    path = run[0]
    drawings = re.findall(r"<svg.*?</svg>", (path / "report.html").read_text(), re.DOTALL)
    assert len(drawings) >= 10
    for drawing in drawings:
        assert "nan" not in drawing and "inf" not in drawing
        assert ElementTree.fromstring(drawing).findall("text")


@pytest.mark.parametrize("missing", ["summary.json", "samples.jsonl", "metrics.jsonl", "config.toml"])
def test_a_missing_file_is_a_missing_section(tmp_path, missing):
    synthetic_run(tmp_path / "r")
    (tmp_path / "r" / missing).unlink()
    page = Page(write_report(tmp_path / "r").read_text())
    headings = page.said("h2")
    assert ("Configuration" in headings) == (missing != "config.toml")
    assert ("Completions" in headings) == (missing != "samples.jsonl")
    assert ("Policy and optimizer" in headings) == (missing != "metrics.jsonl")
    assert ("Held-out prompts" in headings) == (missing != "summary.json")
    assert ("has written no summary" in page.said("p")) == (missing == "summary.json")


def test_a_run_without_a_judge(tmp_path):
    summary = synthetic_run(tmp_path / "r", judge=False)
    page = Page(write_report(tmp_path / "r").read_text())
    assert "judge change" not in page.said("th")
    assert "Over-refusal" not in page.said()
    assert "The reward" in page.said("span")
    assert figure(summary["objectives"]["safety"]["reward_after"]["mean"]) in page.said("b")


def test_an_interrupted_run_with_one_step(tmp_path):
    run = tmp_path / "r"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"phase": "grpo", "step": 1, "reward/a": 0.5, "time/step_s": 1}\n{"pha'
    )
    (run / "summary.json").write_text('{"status": "interrupted", "steps": 1, "phase_s": {}}')
    page = Page(write_report(run).read_text())
    assert "was interrupted after step 1 of GRPO" in page.said("p")
    (run / "summary.json").unlink()
    assert "last seen at step 1 of GRPO" in Page(write_report(run).read_text()).said("p")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="found nothing"):
        write_report(tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_the_command_rebuilds_it(run, capsys):
    path = run[0]
    before = (path / "report.html").read_text()
    (path / "report.html").unlink()
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path / "report.html")
    assert (path / "report.html").read_text() == before
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: main([str(path / "absent")]))
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(path / "absent") in err


def test_ticks_are_round_and_few():
    for low, high in [
        (0, 1),
        (0.412, 0.873),
        (1, 120),
        (0, 3e-4),
        (-2.5e-3, 7e-3),
        (0, 152_000),
        (5, 5.0001),
    ]:
        marks = ticks(low, high)
        assert 3 <= len(marks) <= 6 and low <= marks[0] + 1e-12 and marks[-1] <= high + 1e-9
    assert [tick_text(v, 0.25) for v in (0, 0.25, -0.5)] == ["0", "0.25", "−0.50"]
    assert [tick_text(v, s) for v, s in ((20, 20), (1e-6, 1e-6), (2.5, 2.5), (200000, 100000))] == [
        "20", "1e−6", "2.5", "2e5",
    ]  # fmt: skip


def test_long_runs_are_averaged_and_gaps_stay_open():
    x = list(range(5000))
    line = Series(name="a", x=x, y=[math.sin(v / 500) for v in x], colour="red", spread=[0.1] * 5000)
    assert len(line_chart([line], "sine")) < 12_000
    gap = Series(name="a<b", x=[1, 2, 3, 4, 5], y=[1.0, 2.0, None, 2.0, 1.0], colour="red")
    drawn = line_chart([gap, Series(name="c", x=[1], y=[3.0], colour="blue", marks=True)], 'quo"te<')
    assert drawn.count("class='line'") == 3 and "a&lt;b" in drawn and "&lt;" in drawn
    ElementTree.fromstring(drawn)
    ElementTree.fromstring(stacked_chart(["a", "b"], [1, 2], [[1.0, 2.0], [0.0, 1.0]], "time"))
    constant = Series(name="k", x=[1, 2], y=[0.0, 0.0], colour="red")
    ElementTree.fromstring(line_chart([constant], "constant", floor=0.0))


def test_the_step_of_a_warning_is_marked_in_the_charts_it_is_about(tmp_path: Path):
    synthetic_run(tmp_path / "run", steps=30)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["phase"] == "grpo":
            row |= {
                "duplicate_frac": 0.9 if row["step"] > 20 else 0.1,
                "group_std/tone": 0.3,
                "group_std/safety": 0.3,
            }
            row |= {"reward/tone": 0.5, "reward/safety": 0.5}
            row |= {"over/kl": 1.0, "warning/limit_kl": 1.0} if row["step"] == 12 else {}
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path / "run").read_text()
    assert re.findall(r'class="warning">Step (\d+)', page) == ["12", "23"]
    marked = [
        re.search(r"aria-label='([^']*)'", svg) for svg in page.split("<svg")[1:] if "class='event'" in svg
    ]
    assert [found[1] for found in marked if found] == ["KL divergence", "Repeated outputs"]
