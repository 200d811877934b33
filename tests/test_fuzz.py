"""A short run of every fuzzer, every input that once broke something, and the fuzzer's own ways to notice."""

import random
from pathlib import Path

import pytest

from tests.fuzz.__main__ import CASES, fuzz
from tests.fuzz.mutate import mutated
from tests.fuzz.planted import PLANTED
from tests.fuzz.target import attempt
from tests.fuzz.targets import TARGETS, inputs_of

SHORT = 1000


def tried(name: str, data: bytes, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    assert not (problem := attempt(TARGETS[name], data, folder)), f"{problem} of {data[:300]!r}"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_nothing_but_declared_errors(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = TARGETS[name]
    corpus = target.corpus()
    for data in corpus[:3]:
        tried(name, data, tmp_path / "in")
    for place in range(inputs_of(SHORT)[name]):
        tried(name, mutated(target.form, corpus, random.Random(f"short {name} {place}")), tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "wrote outside its folder"


@pytest.mark.parametrize("case", sorted(CASES.glob("*--*")), ids=lambda path: path.name)
def test_what_broke_something_once(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried(case.name.rpartition("--")[0], case.read_bytes(), tmp_path / "in")


def test_the_fuzzer_notices_every_kind_of_fault():
    found = fuzz(dict.fromkeys(PLANTED, 2), 0, planted=True)
    said = {finding["target"]: finding["problem"] for finding in found.findings}
    assert set(said) == set(PLANTED) - {"refuses"} and set(found.inputs) == set(PLANTED)
    assert "KeyError" in said["raises"] and "MemoryError" in said["grows"]
    assert "hang" in said["hangs"] and "code 9" in said["dies"] and "outside" in said["escapes"]
