"""docs/cost.md says what the committed records say; pictures, report and page of a made-up record."""

import json
import re

import pytest

from benchmarks.cost import page
from grpo_fast.errors import UserError
from tests.cost_records import lively_record


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page written from one made-up record."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "cost-cpu.json").write_text(json.dumps(lively_record(seeds=5)))
    path = folder / "cost.md"
    path.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    assert page.main(["--results", str(folder), "--page", str(path)]) == 0
    return path


def test_the_committed_page_is_what_the_command_writes():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.rewritten(text, page.read_records(page.RESULTS)) == text


def test_every_block_stands_on_the_page_once():
    text = page.PAGE.read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- begin: ([\w-]+) -->", text)) == sorted(page.BLOCKS)
    assert sorted(re.findall(r"<!-- end: ([\w-]+) -->", text)) == sorted(page.BLOCKS)


def test_every_picture_and_file_that_the_page_names_is_there():
    text = page.PAGE.read_text(encoding="utf-8")
    links = re.findall(r"\]\((\.\./[^)]+)\)", text) + [
        f"../{name}" for name in re.findall(r"`((?:benchmarks|tests|docs)/[\w./-]+\.(?:py|md))`", text)
    ]
    assert links and not [link for link in links if not (page.PAGE.parent / link).exists()]


def test_a_record_fills_the_page(made):
    text = made.read_text(encoding="utf-8")
    assert "| wall time | GRPO without KL |" in text
    assert "> **PPO shared trunk, seed 1: diverged (loss is not finite at step 42)" in text
    assert "Not measured yet: `python -m benchmarks.cost.peers --dpo-python" in text
    assert "Not measured yet: `python -m benchmarks.cost` " not in text
    assert text.index("| what counts |") < 2500  # the answer stands in the first screen
    named = re.findall(r"benchmarks/results/(cost-cpu-\w+\.png)", text)
    assert len(named) == 6 and all((made.parent / name).read_bytes()[:4] == b"\x89PNG" for name in named)
    assert page.rewritten(text, page.read_records(made.parent)) == text


def test_a_changed_figure_would_be_seen(made):
    text = made.read_text(encoding="utf-8").replace("GRPO is ahead of", "GRPO loses to")
    assert page.rewritten(text, page.read_records(made.parent)) != text


def test_records_of_two_machines_stand_side_by_side_only_with_a_word(made):
    records = page.read_records(made.parent)
    records["cost-quick-cpu"] = records["cost-cpu"] | {"device": "another CPU", "quick": True}
    text = page.rewritten(page.PAGE.read_text(encoding="utf-8"), records)
    assert "> **The records below come from different devices (AMD EPYC, another CPU)" in text


def test_other_records_are_shown(made):
    records = page.read_records(made.parent)
    ends = {"flops": 1e9, "memory": 2**21, "seconds": 0.5}
    case = {"algorithm": "ppo", "name": "hidden 192", "predicted": ends, "measured": ends | {"seconds": 0.4}}
    case |= {"ratio": {"flops": 1.0, "memory": 1.0, "seconds": 1.25}}
    bars = {"flops": 0.05, "memory": 0.15, "seconds": 0.2}
    records["cost-model-cpu"] = {
        "benchmark": "cost-model",
        "device": "AMD EPYC",
        "bars": bars,
        "cases": [case],
    }
    records["cost-peers-cpu"] = {"benchmark": "unknown", "device": "AMD EPYC", "median_s": {"padded": 1.0}}
    text = page.rewritten(page.PAGE.read_text(encoding="utf-8"), records)
    figures = "| 1.000 | 1.000 | 1.000 | 2.000 | 2.000 | 1.000 | 0.5000 | 0.4000 | 1.250 | seconds |"
    assert f"| ppo, hidden 192 {figures}" in text and "| padded | 1,000 |" in text


def test_unequal_terms_make_no_page(tmp_path):
    record = lively_record(seeds=1)
    record["cells"][3]["fingerprint"]["heldout"] = "another"
    (tmp_path / "cost-cpu.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="rloo, seed 0 had another heldout"):
        page.read_records(tmp_path)


def test_a_block_that_nobody_writes():
    with pytest.raises(UserError, match="no block is called answers"):
        page.rewritten("<!-- begin: answers -->\n<!-- end: answers -->", {})


def test_the_report_of_a_run(tmp_path):
    record = lively_record(seeds=5)
    record["cells"] = [
        found for found in record["cells"] if found["algorithm"] in ("grpo", "ppo", "ppo_shared")
    ]
    path = page.report(record, tmp_path)
    html = path.read_text(encoding="utf-8")
    assert path.name == "report.html" and html.count("data:image/png") == 6
    assert "GRPO is ahead of" in html and "PPO shared trunk" in html
