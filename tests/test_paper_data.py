"""The paper's experiment without models: what is chosen from the data sets, intervals, mistakes on the command line."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from benchmarks.paper import __main__ as paper
from benchmarks.paper.prepare import Amounts, choose
from benchmarks.paper.results import paired_rates, wilson
from benchmarks.paper.sources import SOURCES, read
from grpo_fast.errors import UserError
from tests.judge_server import JudgeServer
from tests.paper_case import AMOUNTS, FILES, flags, rating


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    with JudgeServer(models=("rater", "evaluator")) as server:
        server.rate = rating
        yield server


def test_the_choice_does_not_depend_on_the_order():
    rows = {source.name: read(source, FILES) for source in SOURCES}
    amounts = Amounts(harmful=5, borderline=5, benign=5, heldout=2, replies=8)
    chosen = choose(rows, amounts)
    assert choose({name: some[::-1] for name, some in rows.items()}, amounts) == chosen
    assert Counter(p.kind for p in chosen.training) == dict.fromkeys(("harmful", "borderline", "benign"), 5)
    replies = Counter((source, reply.safety) for reply, source in chosen.replies)
    assert replies == {("beavertails", 0.0): 2, ("beavertails", 1.0): 2, ("helpsteer2", None): 4}


def test_data_that_cannot_be_had_or_lacks_a_column(tmp_path):
    words = ["prepare", "--folder", str(tmp_path / "out")]
    with pytest.raises(
        UserError, match=r"cannot load data set PKU-Alignment/BeaverTails.*give --files FOLDER"
    ):
        paper.main(words)  # the tests are offline
    with pytest.raises(UserError, match=r"holds no beavertails.jsonl"):
        paper.main([*words, "--files", str(tmp_path)])
    for path in FILES.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "xstest.jsonl").write_text('{"prompt": "a", "kind": "safe"}\n')
    with pytest.raises(UserError, match=r"xstest.jsonl:1: no column label, which Paul/XSTest has"):
        paper.main([*words, "--files", str(tmp_path)])


def test_the_order_of_the_commands(tmp_path, judge):
    folder = ["--folder", str(tmp_path / "none")]
    for words in (["label", *folder], ["run", "--size", "7b", *folder]):
        with pytest.raises(UserError, match=r"is not prepared: python -m benchmarks.paper prepare"):
            paper.main([*words, *flags(judge, "rater")])
    paper.main(["prepare", *folder, "--files", str(FILES), *AMOUNTS])
    with pytest.raises(UserError, match=r"has no ratings: python -m benchmarks.paper label"):
        paper.main(["run", "--size", "7b", *folder, *flags(judge, "evaluator")])
    with pytest.raises(UserError, match="has no trained model"):
        paper.main(["evaluate", str(tmp_path), *flags(judge, "evaluator")])


def test_the_interval_of_a_change_of_rates():
    """It is never of width 0, lies around the change, and narrows with the number of pairs."""
    still = paired_rates(torch.zeros(500))["ci95"]
    assert still[0] < 0 < still[1] and still[1] - still[0] < paired_rates(torch.zeros(50))["ci95"][1] * 2
    better = torch.tensor([-1.0] * 40 + [1.0] * 10 + [0.0] * 50)
    # (40.5 - 10.5) / 102, and 1.96 standard deviations of it
    assert paired_rates(better)["ci95"] == pytest.approx([-0.4184, -0.1698], abs=1e-3)
    assert paired_rates(better)["mean"] == pytest.approx(-0.3)


def test_wilsons_interval():
    """Against the textbook value for 0 and for 1 of 10, and it never leaves [0, 1]."""
    none = wilson(torch.tensor([0.0] * 10 + [torch.nan]))
    assert none["mean"] == 0 and none["ci95"] == pytest.approx([0, 0.2775], abs=1e-3)
    one = wilson(torch.tensor([0.0] * 9 + [1.0]))
    assert one["ci95"] == pytest.approx([0.0179, 0.4042], abs=1e-3)
