"""The page of a benchmark's record: every text is only text, pictures are inside, nothing is loaded from elsewhere."""

import html
import json
import re
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.page import Picture, write_page
from benchmarks.page_tables import SHOWN, medians
from benchmarks.tables import Table
from grpo_fast.errors import UserError

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
HOSTILE = "<script>alert('x')</script>\x1b[2J"
PNG = b"\x89PNG\r\n\x1a\nnot really"


def test_hostile_texts_stay_texts(tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(PNG)
    path = write_page(
        tmp_path / "page.html",
        title=HOSTILE,
        what=HOSTILE,
        record={"device": HOSTILE, "versions": {HOSTILE: HOSTILE}, "command": HOSTILE, "why": HOSTILE},
        tables=[Table(title=HOSTILE, head=["", HOSTILE], rows=[[HOSTILE, HOSTILE]], note=HOSTILE)],
        pictures=[Picture(path=picture, caption=HOSTILE + '" onload="x')],
        notes=[HOSTILE],
        source=tmp_path / f"a{HOSTILE[:8]}.json",
    )
    text = path.read_text()
    assert "<script" not in text and "\x1b" not in text and '" onload="' not in text
    assert text.count("&lt;script&gt;") >= 10
    assert "data:image/png;base64,iVBOR" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|\./)""", text) and "url(" not in text


def test_cells_and_provenance(tmp_path):
    table = Table(title="t", head=["", "a", "b", "c", "d"], rows=[["row", 0.123456, None, 12345, True]])
    record = {"device": "a CPU", "threads": 2, "commit": "abc+", "versions": {"torch": "2"}}
    text = write_page(tmp_path / "p.html", title="T", what="w", record=record, tables=[table]).read_text()
    assert re.findall(r'<td data-label="\w">([^<]*)</td>', text) == ["0.1235", "–", "12,345", "yes"]
    assert "<dd>torch 2</dd>" in text and "<dd>abc+ (with changes that are in no commit)</dd>" in text
    assert '<th scope="row">row</th>' in text
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        write_page(
            tmp_path / "p.html",
            title="",
            what="",
            record={},
            tables=[Table(title="t", head=["", "a"], rows=[["x"]])],
        )


def test_a_large_record_is_linked_not_repeated(tmp_path):
    source = tmp_path / "big record.json"
    record = {"benchmark": "x", "samples": ["y" * 100] * 5000}
    source.write_text(json.dumps(record))
    found = page.page_of(source, command="python -m benchmarks.x")
    assert found is not None and found == tmp_path / "big record.html"
    text = found.read_text()
    assert "yyyy" not in text and 'href="./big%20record.json"' in text and "too large" in text
    assert "<dd>python -m benchmarks.x</dd>" in text


@pytest.mark.parametrize("source", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_records_have_their_own_page(source, tmp_path, capsys):
    record = json.loads(source.read_text())
    if (record.get("benchmark") or record.get("suite")) not in SHOWN:
        pytest.skip("its own command makes its page")
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    assert page.main([str(copy)]) == 0
    assert capsys.readouterr().out.strip() == str(copy.with_suffix(".html"))
    text = html.unescape(copy.with_suffix(".html").read_text())
    assert f"<h1>{SHOWN[record.get('benchmark') or record['suite']][0]}</h1>" in text
    assert record["commit"][:40] in text and text.count("<table") >= 1 and text.count("<td") >= 3


def test_pictures_beside_a_record_are_found(tmp_path):
    source = tmp_path / "step-cpu.json"
    source.write_text(json.dumps({"benchmark": "step", "device": "AMD EPYC", "bars": {}}))
    for name in ("step-cpu.png", "step-amd-epyc.png", "step-other.png"):
        (tmp_path / name).write_bytes(PNG)
    found = page.page_of(source)
    assert found is not None and found.read_text().count("<img") == 2


def test_medians_are_found_however_deep():
    record = {"a": {"b": {"median_s": {"x": 1.0, "y": 2.0}, "samples_s": {"x": [0.5, 1.0, 3.0]}}}}
    [table] = medians(record)
    assert table.title == "A, b"
    assert table.rows == [["x", 1000.0, 750.0, 2000.0, 1.0], ["y", 2000.0, None, None, 2.0]]


def test_what_is_no_record_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.json"
    for content, said in (
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[1]", "is no record"),
        ("{}", "no record"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=said):
            page.main([str(path)])
    picture = tmp_path / "p.png"
    picture.write_bytes(b"text")
    with pytest.raises(UserError, match="no PNG or JPEG"):
        write_page(tmp_path / "p.html", title="", what="", record={}, pictures=[Picture(path=picture)])


def test_a_bare_machine_keeps_its_record_without_a_page(tmp_path, monkeypatch, capsys):
    source = tmp_path / "x.json"
    source.write_text('{"benchmark": "x"}')

    def absent(*_, **__):
        raise ModuleNotFoundError("No module named 'rich'")

    monkeypatch.setattr(page, "render", absent)
    assert page.page_of(source) is None and not source.with_suffix(".html").exists()
    assert "no page made of it (No module named 'rich')" in capsys.readouterr().err
