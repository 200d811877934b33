"""A reward model's page says what its files say, and nothing in them can act on its reader."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from grpo_fast.errors import UserError
from grpo_fast.report.charts import heat_map, reliability_chart, scatter_chart
from grpo_fast.report.page import main
from grpo_fast.report.reward_page import write_reward_report
from grpo_fast.report.template import figure, interval, signed
from grpo_fast.trust.calibration import calibration_effect
from grpo_fast.trust.probes import PROBES, probe_verdicts
from grpo_fast.trust.quality import HeadView, trust_report

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31m\u202e'\"{{ 7*7 }}&amp;\x00"
HEADS = [
    HeadView(name="helpfulness", kind="regression", low=0, high=4, mean=2, std=1.2),
    HeadView(name="safety", kind="binary", std=0.5, mean=0.5),
    HeadView(name="noise", kind="ordinal", low=0, high=4, mean=2, std=1.2),
    HeadView(name="preference", kind="pairwise"),
    HeadView(name=f"odd {HOSTILE}", kind="regression", low=0, high=4, mean=2, std=1.2),
]


def planted_quality() -> dict:
    """What the measures say of a good, a fair, a useless, a compared and a wordy head."""
    rng, n = np.random.default_rng(0), 400
    truth, length = rng.uniform(0, 4, n), rng.integers(5, 300, n)
    labels = np.stack([truth, truth > 2, rng.integers(0, 5, n), np.full(n, np.nan), truth], axis=1).astype(
        float
    )
    scores = np.stack(
        [
            truth + 0.5 * rng.standard_normal(n),
            1 / (1 + np.exp(4 - 2 * truth + rng.standard_normal(n))),
            rng.uniform(0, 4, n),
            2 * truth - 4 + rng.standard_normal(n),
            truth + 0.01 * (length - 150),
        ],
        axis=1,
    )
    pairs = rng.permutation(n).reshape(-1, 2)
    better = [
        (3, *(pair if truth[pair[0]] > truth[pair[1]] else pair[::-1]).tolist(), None) for pair in pairs
    ]
    probed = {
        name: scores + rng.normal(0.8 if name == "flattery" else -0.3, 1, scores.shape) for name in PROBES
    }
    return {
        "heads": trust_report(scores, labels, length, HEADS, better),
        "probes": probe_verdicts(scores, probed, HEADS),
        "calibration": {"helpfulness": calibration_effect("regression", scores[:, 0], labels[:, 0])},
        "data": {
            "warnings": [f"7 replies are duplicates {HOSTILE}"],
            "counts": {"replies": 54321, HOSTILE: HOSTILE},
        },
        "outside": {"held-out replies": {"share": 0.0125, "n": 400}, HOSTILE: {"share": 0.5, "n": HOSTILE}},
    }


def planted_run(run: Path) -> dict:
    """A finished run's files; returns its quality."""
    run.mkdir(parents=True)
    quality = planted_quality()
    (run / "quality.json").write_text(json.dumps(quality, allow_nan=False))
    rows = [
        {"phase": "reward_model", "step": s, "time_s": s, "lr": 1e-3, "loss": 3 / s, HOSTILE: s}
        | {f"loss/{head.name}": 2 / s for head in HEADS}
        | ({"eval/loss": 3.5 / s} if s % 5 == 0 else {})
        for s in range(1, 31)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [
        {
            "prompt": HOSTILE if i == 1 else f"prompt {i}",
            "completion": f"reply {i} {HOSTILE}" if i else "",
            "scores": {head.name: 0.1 * i for head in HEADS},
            "labels": {head.name: None if i == 2 else 1.25 for head in HEADS},
        }
        for i in range(9)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    summary = {
        "name": run.name,
        "status": "finished",
        "steps": 30,
        "wall_s": 185.0,
        "seed": 7,
        "environment": {"d": HOSTILE},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.toml").write_text(f"# {HOSTILE}\nseed = 7\n")
    return quality


class Page(HTMLParser):
    """Tags with their attributes, and text by the tag around it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
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
    quality = planted_run(run)
    return run, quality, Page(write_reward_report(run).read_text())


def test_every_head_has_its_verdict_and_its_figures(run):
    _, quality, page = run
    chips = [
        data
        for (tag, data) in page.text
        if tag == "span" and data in ("trustworthy", "weak", "untrustworthy")
    ]
    assert chips == [measures["verdict"] for measures in quality["heads"].values()]
    assert set(chips) == {"trustworthy", "weak", "untrustworthy"}
    said = page.said("b", "small")
    for head, key in (
        ("helpfulness", "spearman"),
        ("safety", "pairwise_accuracy"),
        ("preference", "pairwise_accuracy"),
    ):
        measures = quality["heads"][head]
        assert figure(measures[key]) in said and interval({"ci95": measures[f"{key}_ci95"]}) in said
        assert figure(measures["ece"]) in said and figure(measures["length_correlation"]) in said
    assert f"{figure(quality['calibration']['helpfulness']['after'])} calibrated" in said
    for measures in quality["heads"].values():
        assert all(reason in page.said("li") for reason in measures["reasons"])


def test_probes_show_what_decided_and_exploits_stand_out(run):
    _, quality, page = run
    loud = [
        data
        for (tag, attributes), data in zip(*_bold(page), strict=True)
        if attributes.get("class") == "down"
    ]
    expected = []
    for effects in quality["probes"].values():
        for effect in effects.values():
            value = effect.get("over_median_std", effect["change_std"])
            assert signed(value) in page.said("b")
            expected += [signed(value)] if effect["verdict"] == "exploitable" else []
    assert loud == expected and 0 < len(expected) < len(HEADS) * len(PROBES)


def _bold(page):
    tags = [tag for tag in page.tags if tag[0] == "b"]
    return tags, [data for tag, data in page.text if tag == "b"]


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


def test_the_page_has_every_section(run):
    _, _, page = run
    assert [data for tag, data in page.text if tag == "h2"] == [
        "Can it be trusted?",
        "Do scores mean what labels mean?",
        "Score and length",
        "Heads together",
        "Exploit probes",
        "Unlike what it was trained on",
        "Training",
        "Held-out replies",
        "Data",
        "Configuration",
        "Environment",
    ]
    assert "54321" in page.said("dd") and "1.2%" in page.said("span") and "7 replies are" in page.said("li")
    assert all(f"reply {i}" in page.said("div") for i in range(1, 9)) and "(empty)" in page.said("em")
    assert "label 1.250" in page.said("small") and "label –" in page.said("small")


def test_charts_are_well_formed(run):
    drawings = re.findall(r"<svg.*?</svg>", (run[0] / "report.html").read_text(), re.DOTALL)
    # reliability, length and correlations; the loss with that of each head, held out, the rate, the odd one
    assert len(drawings) == 5 + 5 + 2 + 4
    losses = next(drawing for drawing in drawings if "aria-label='loss'" in drawing)
    assert losses.count("class='line'") == 1 + len(HEADS)
    for drawing in drawings:
        assert "nan" not in drawing and "inf" not in drawing
        assert ElementTree.fromstring(drawing).findall("text")  # control characters would not be XML


@pytest.mark.parametrize("section", ["heads", "probes", "calibration", "data", "outside"])
def test_a_missing_part_is_a_missing_section(tmp_path, section):
    quality = planted_run(tmp_path / "r")
    del quality[section]
    (tmp_path / "r" / "quality.json").write_text(json.dumps(quality))
    page = Page(write_reward_report(tmp_path / "r").read_text())
    headings = page.said("h2")
    assert ("Can it be trusted?" in headings) == (section != "heads")
    assert ("Exploit probes" in headings) == (section != "probes")
    assert ("Data" in headings) == (section != "data")
    assert ("Unlike" in headings) == (section != "outside")


def test_the_other_files_may_all_be_missing_and_measures_undefined(tmp_path):
    nothing = trust_report(np.zeros((1, 1)), np.full((1, 1), np.nan), np.ones(1), HEADS[:1])
    (tmp_path / "quality.json").write_text(json.dumps({"heads": nothing, "probes": {"helpfulness": {}}}))
    page = Page(write_reward_report(tmp_path).read_text())
    assert "untrustworthy" in page.said("span") and "–" in page.said("b")
    (tmp_path / "quality.json").write_text("{}")
    assert Page(write_reward_report(tmp_path).read_text()).said("h2") == ""


def test_what_is_no_such_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a reward model's run: quality\.json"):
        write_reward_report(tmp_path)
    (tmp_path / "quality.json").write_text("[1]")
    with pytest.raises(UserError, match="expected a JSON object"):
        write_reward_report(tmp_path)


def test_the_report_command_knows_a_reward_model_s_run(run, capsys):
    path = run[0]
    before = (path / "report.html").read_text()
    (path / "report.html").unlink()
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path / "report.html")
    assert (path / "report.html").read_text() == before


def test_charts_say_where_things_are():
    drawn = ElementTree.fromstring(scatter_chart([(0, 0), (10, 1)], "a<b", across="tok<", colour="red"))
    low, high = [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in drawn.findall("circle")]
    assert low[0] < high[0] and low[1] > high[1] and "tok<" in [t.text for t in drawn.findall("text")]
    drawn = ElementTree.fromstring(reliability_chart([(0.2, 0.2, 9), (0.8, 0.8, 36)], "r", colour="red"))
    line = {k: float(v) for k, v in (drawn.findall("line")[-1].attrib | {"class": "0"}).items()}
    slope = (line["y2"] - line["y1"]) / (line["x2"] - line["x1"])
    for dot in drawn.findall("circle"):  # equal numbers lie on the diagonal
        x, y = float(dot.get("cx") or 0), float(dot.get("cy") or 0)
        assert y == pytest.approx(line["y1"] + slope * (x - line["x1"]), abs=0.2)
    assert [float(dot.get("r") or 0) for dot in drawn.findall("circle")] == [pytest.approx(2.2, abs=0.1), 4.5]
    drawn = ElementTree.fromstring(heat_map(["a", "b<"], [[None, -0.5], [-0.5, None]], "h"))
    cells = [rect.get("fill") for rect in drawn.findall("rect")]
    assert cells == ["var(--grid)", "var(--c1)", "var(--c1)", "var(--grid)"]
    assert [t.text for t in drawn.findall("text")].count("−0.50") == 2
    ElementTree.fromstring(reliability_chart([(0.5, 0.5, 1)], "one", colour="red"))
    ElementTree.fromstring(heat_map([f"head {i}" for i in range(30)], [[0.5] * 30] * 30, "many"))
