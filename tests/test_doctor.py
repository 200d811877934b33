"""The report on a machine: what it says is there is there, what fails is a problem, and the exit code says so."""

import json

import pytest
import torch

from grpo_fast import doctor
from grpo_fast.attention import backends

CPU = torch.device("cpu")


def test_a_machine_that_can_run_is_fine(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--json", "--folder", str(tmp_path / "runs")])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert stop.value.code == 0, [f for f in findings if f["state"] == "problem"]
    by_name = {finding["what"]: finding for finding in findings if finding["part"] != "loss head"}
    assert by_name["torch"]["says"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"attention", "loss head", "room", "devices"} <= {finding["part"] for finding in findings}
    if not torch.cuda.is_available():
        assert (
            by_name["GPU"]["state"] == "note"
            and "merged SDPA tiles" in by_name["heads of Qwen2.5 7B"]["says"]
        )


def test_the_table_names_everything(tmp_path, capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "loss head" in shown and tmp_path.name in "".join(shown.split())
    assert shown.splitlines()[-1].startswith("a run can go well here")


def test_the_verdict_names_what_is_to_be_mended():
    found = [
        doctor.Finding(part="a", what=state, says="", state=state) for state in ("fine", "note", "problem")
    ]
    assert doctor.verdict(found) == "to be mended before a run can go well: problem"
    assert doctor.verdict(found[:2]).endswith("worth knowing: note")


@pytest.mark.parametrize(
    "driver, says", [(None, "no NVIDIA driver answers"), ("470.1", "driver 470.1 may be too old")]
)
def test_a_gpu_that_is_not_found_is_explained(monkeypatch, driver, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    found = doctor.devices()[0]
    assert found.state == "note" and "built for CUDA 13.0" in found.says and says in found.says


def test_free_memory_and_disk_are_told(tmp_path):
    found = {finding.what: finding.says for finding in doctor.room(CPU, tmp_path)}
    assert "GiB free at" in found["disk"] and "GiB free at" in found["disk for models"]
    assert "GiB free" in found["memory"] or doctor._free_host_bytes() is None


def test_a_kernel_that_computes_something_else_is_a_problem(monkeypatch):
    real = doctor.linear_logprob
    monkeypatch.setattr(doctor, "linear_logprob", lambda *a, **k: (real(*a, **k)[0] + 0.1, None))
    assert [f.state for f in doctor.loss_head(CPU)] == ["problem"]
    monkeypatch.setattr(doctor, "linear_logprob", lambda *a, **k: 1 / 0)
    found = doctor.loss_head(CPU)[0]
    assert found.state == "problem" and "ZeroDivisionError" in found.says


def broken_path(*_, **__) -> torch.Tensor:
    raise ZeroDivisionError


def test_an_attention_that_fails_is_told_with_its_reason(monkeypatch):
    broken = [
        backends.Backend(name="broken", choice="sdpa", run=broken_path, devices=("cpu",)),
        backends.REFERENCE,
    ]
    monkeypatch.setattr(backends, "TABLE", broken)
    says = doctor.attention(CPU)[0].says
    assert says.startswith("padded rectangles (broken failed: ZeroDivisionError")


def test_an_old_package_is_a_problem(monkeypatch):
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: "4.0.0" if name == "transformers" else real(name))
    found = next(f for f in doctor.software() if f.what == "transformers")
    assert found.state == "problem" and "pip install" in found.says


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor.room(CPU, tmp_path / "a" / "b")[1].state == "problem"


def test_a_wrong_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--jsn"])
    assert stop.value.code == 2 and "--json" in capsys.readouterr().err
