"""The benchmarks themselves: a small run, its record, the picture and the table."""

import json

import pytest

from benchmarks import body, figures, loss_head


def test_a_record_its_table_and_its_picture(tmp_path, capsys):
    path = tmp_path / "record.json"
    flags = ["--shape", "64,16,501", "--repeats", "2", "--warmup", "0", "--threads", "1", "--contenders"]
    with pytest.raises(SystemExit):
        loss_head.main([*flags, "products,nothing"])
    assert "unknown contender 'nothing'" in capsys.readouterr().err
    assert loss_head.main([*flags, "products,torch,eager,triton", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["shape"] == [64, 16, 501] and record["mode"] == "trained" and record["commit"]
    for name in ("torch", "eager"):
        assert record["contenders"][name]["agrees"] and len(record["contenders"][name]["samples_s"]) == 2
    absent = record["contenders"]["triton"]  # runs in Triton's interpreter only, if that is on
    assert absent["error"] is None or "needs CUDA tensors" in absent["error"]
    assert {"products", "torch", "eager"} <= set(record["median_s"])
    capsys.readouterr()
    assert figures.main([str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) >= 5 and "| 64, 16, 501 | trained head | products |" in table[2]
    [picture] = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_records(tmp_path, capsys):
    assert figures.main([str(tmp_path)]) == 2
    assert "no record" in capsys.readouterr().err


def test_the_body_and_a_contender_that_is_not_measured(tmp_path, capsys):
    path = tmp_path / "body.json"
    flags = ["--shapes", "miniature", "--tokens", "300", "--repeats", "2", "--output", str(path)]
    with pytest.raises(SystemExit):
        body.main([*flags, "--contenders", "eager,nothing"])
    assert "unknown 'nothing'" in capsys.readouterr().err
    assert body.main([*flags, "--contenders", "eager,liger"]) == 0
    assert (
        "liger       not measured: RuntimeError: Liger's kernels need a CUDA device"
        in capsys.readouterr().out
    )
    record = json.loads(path.read_text())
    assert len(set(record["tokens"])) == 3 and record["commit"] and record["versions"]["torch"]
    rows = record["shapes"]["miniature"]["contenders"]
    assert len(rows["eager"]["samples_s"]) == 2 and rows["eager"]["agrees"]
    assert rows["liger"]["samples_s"] == [] and rows["liger"]["agrees"] is None
