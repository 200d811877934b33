"""The run folder, the metrics of an interrupted and resumed run, and the progress display."""

import builtins
import errno
import io
import json
import math
import os
import pty
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_fast.errors import UserError
from grpo_fast.run import checkpoint, lock, metrics
from grpo_fast.run.command import run_command
from grpo_fast.run.follow import ENDING
from grpo_fast.run.metrics import RunLogger, read_rows, read_summary, reproducible
from grpo_fast.run.progress import Curve, Progress, duration, si, sparkline
from grpo_fast.shown import plain_text
from grpo_fast.state import resumed_logger


def create(path) -> RunLogger:
    return RunLogger.create(path, config_toml='name = "r"\n')


def test_a_folder_that_is_being_written_is_held(tmp_path, monkeypatch):
    run = tmp_path / "r"
    with create(run) as log:
        log.step("grpo", 1, {"loss": 1.0})
        with pytest.raises(
            UserError, match=rf"in use by process {os.getpid()} on .*: stop that one, or wait"
        ):
            RunLogger.resume(run, phase="grpo", step=1)
        script = f"from grpo_fast.run.lock import hold; from pathlib import Path; hold(Path({str(run)!r}))"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert f"in use by process {os.getpid()}" in other.stderr
    with RunLogger.resume(run, phase="grpo", step=1):
        pass

    def looked_at(*_):
        raise AssertionError("a checkpoint that the other process is about to replace")

    with create(tmp_path / "other") as log, monkeypatch.context() as patch:
        patch.setattr(checkpoint, "latest", looked_at)
        log.step("grpo", 1, {"loss": 1.0})
        with pytest.raises(UserError, match="in use by process"):
            resumed_logger(tmp_path / "other", phase="grpo", longer="--run.steps", steps=3)

    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", without_locks)
    with RunLogger.resume(run, phase="grpo", step=1), RunLogger.resume(run, phase="grpo", step=1):
        pass


def test_a_run_folder_holds_what_was_logged(tmp_path):
    with create(tmp_path / "runs" / "r") as log:
        row = log.step("grpo", 1, {"loss": torch.tensor(0.5), "kl": np.float32(2.0), "n": 3, "flag": True})
        log.step("grpo", 2, {"loss": math.nan, "kl": -math.inf})
        log.samples(
            [{"when": "before", "step": 0, "prompt": "p\u2028\x1b", "completion": "é\n", "scores": {"s": 1}}]
        )
        log.summary(
            {"steps": 2, "objectives": {"s": {"reward_before": {"mean": math.nan, "ci95": (0.0, 1.0)}}}}
        )
    run = tmp_path / "runs" / "r"
    rows = read_rows(run / "metrics.jsonl")
    assert rows[0] == row
    assert reproducible(rows[0]) == {"phase": "grpo", "step": 1, "loss": 0.5, "kl": 2.0, "n": 3, "flag": True}
    assert rows[1]["loss"] is None and rows[1]["kl"] is None
    assert rows[1]["time_s"] >= rows[0]["time_s"] >= 0
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == 2
    assert read_rows(run / "samples.jsonl")[0]["prompt"] == "p\u2028\x1b"
    summary = read_summary(run)
    assert summary is not None and summary["objectives"]["s"]["reward_before"] == {
        "mean": None,
        "ci95": [0.0, 1.0],
    }
    assert summary["wall_s"] >= 0 and summary["phase_s"] == {}
    assert (run / "config.toml").read_text() == 'name = "r"\n'
    events = EventAccumulator(str(run / "tensorboard" / "grpo"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5)]


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=f"already exists; go on with it: --resume {tmp_path / 'r'}"):
        create(tmp_path / "r")
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create run folder .*: Not a directory"):
        create(tmp_path / "file" / "r")


def test_a_run_that_fails_before_its_first_row_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), create(tmp_path / "r"):
        raise RuntimeError
    assert not (tmp_path / "r").exists()
    with pytest.raises(RuntimeError), create(tmp_path / "r") as log:
        log.step("warm_start", 1, {})
        raise RuntimeError
    assert len(read_rows(tmp_path / "r" / "metrics.jsonl")) == 1


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    run = tmp_path / "r"
    with create(run) as log:
        for step in (1, 2, 3):
            log.step("warm_start", step, {"loss": 1.0})
        log.samples([{"when": "before", "step": 0, "prompt": "p", "completion": "c"}])
        for step in range(1, 6):
            with log.phase_timer("rollout"):
                time.sleep(0.002)
            log.step("grpo", step, {"loss": step})
            log.samples([{"when": "step", "step": step, "prompt": "p", "completion": "c"}])
        log.samples([{"when": "after", "step": 5, "prompt": "p", "completion": "c"}])
        log.summary({})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "grpo", "step": 6, "lo')  # killed while it wrote
    before = read_rows(run / "metrics.jsonl")
    assert len(before) == 8
    files = {path: path.read_bytes() for path in run.glob("*.json*")}
    with RunLogger.resume(run, phase="grpo", step=3) as log:
        assert {
            path: path.read_bytes() for path in run.glob("*.json*")
        } == files  # nothing has been computed yet
        assert log.wall_s >= before[5]["time_s"]
        assert log.phase_s["rollout"] == pytest.approx(sum(row["time/rollout_s"] for row in before[3:6]))
        log.samples([])
        kept = read_rows(run / "metrics.jsonl")
        assert [(row["phase"], row["step"]) for row in kept] == [
            *[("warm_start", step) for step in (1, 2, 3)],
            *[("grpo", step) for step in (1, 2, 3)],
        ]
        assert kept == before[:6]
        assert [(row["when"], row["step"]) for row in read_rows(run / "samples.jsonl")] == [
            ("before", 0), ("step", 1), ("step", 2), ("step", 3),
        ]  # fmt: skip
        assert read_summary(run) is None
        log.step("grpo", 4, {"loss": 40})
    rows = read_rows(run / "metrics.jsonl")
    assert rows[-1]["loss"] == 40 and rows[-1]["time_s"] >= rows[-2]["time_s"]
    events = EventAccumulator(str(run / "tensorboard" / "grpo"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    with RunLogger.resume(run, phase="warm_start", step=2) as log:
        log.samples([])
        assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]
        assert read_rows(run / "samples.jsonl") == []


def test_resuming_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.toml"):
        RunLogger.resume(tmp_path, phase="grpo", step=1)


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected one JSON object"):
        read_rows(path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: expected a JSON object"):
        read_summary(tmp_path)


def test_phase_timers_count_each_second_once(tmp_path):
    with create(tmp_path / "r") as log:
        with log.phase_timer("update"):
            time.sleep(0.02)
            with log.phase_timer("reward"):
                time.sleep(0.03)
            with pytest.raises(KeyError), log.phase_timer("reward"):
                raise KeyError
        row = log.step("grpo", 1, {})
        assert row["time/update_s"] >= 0.02 and row["time/reward_s"] >= 0.03
        assert row["time/update_s"] + row["time/reward_s"] <= row["time/step_s"] + 1e-4
        with log.phase_timer("update"):
            time.sleep(0.01)
        second = log.step("grpo", 2, {})
        assert 0.01 <= second["time/update_s"] < row["time/update_s"] + row["time/reward_s"]
        assert log.phase_s["update"] == pytest.approx(
            row["time/update_s"] + second["time/update_s"], abs=1e-5
        )
        with log.phase_timer("warm_start"):  # around several steps: each gets its own share
            time.sleep(0.01)
            third = log.step("grpo", 3, {})
            time.sleep(0.01)
        fourth = log.step("grpo", 4, {})
        assert 0.01 <= third["time/warm_start_s"] <= third["time/step_s"] + 1e-4
        assert 0.01 <= fourth["time/warm_start_s"] <= fourth["time/step_s"] + 1e-4
        with pytest.raises(ValueError, match="phase must be one of"):
            log.step("grpoo", 1, {})


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path, monkeypatch):
    with create(tmp_path / "r") as log:
        log.summary({"steps": 1})
        old = (tmp_path / "r" / "summary.json").read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*summary\.json: No space left on device"):
            log.summary({"steps": 2})
        assert (tmp_path / "r" / "summary.json").read_bytes() == old
        assert [path.name for path in (tmp_path / "r").glob(".*")] == [lock.LOCK]


def test_a_disk_that_fills_leaves_whole_lines(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(UserError, match=r"cannot write .*samples\.jsonl: File too large"),
        create(tmp_path / "r") as log,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            for number in range(100):
                log.samples([{"when": "step", "number": number, "completion": "x" * 100}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = (tmp_path / "r" / "samples.jsonl").read_text()
    assert text.endswith("}\n") and 4000 < len(text) <= 5000
    assert [row["number"] for row in read_rows(tmp_path / "r" / "samples.jsonl")] == list(
        range(text.count("\n"))
    )


def test_wandb_that_is_not_installed_is_said_before_anything_is_made(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(UserError, match="pip install wandb"):
        RunLogger.create(tmp_path / "r", config_toml="", wandb_project="p")
    assert not list(tmp_path.iterdir())


def test_wandb_gets_every_step(tmp_path, monkeypatch):
    calls: list = []

    class Run:
        def log(self, values, step):
            calls.append((values["grpo/loss"], values["grpo/step"], step))

        def finish(self, exit_code):
            calls.append(exit_code)

    class Wandb:
        @staticmethod
        def init(**options):
            calls.append((options["project"], options["name"], options["resume"]))
            return Run()

    monkeypatch.setattr(metrics, "_import_wandb", lambda: Wandb)
    with RunLogger.create(tmp_path / "r", config_toml="", wandb_project="p") as log:
        log.step("grpo", 1, {"loss": 2.0})
    assert calls == [("p", "r", None), (2.0, 1, 1), 0]


def test_peak_memory_is_that_of_this_process():
    assert 0.05 < metrics.peak_memory_gib() < 64


def test_plain_output_is_one_line_a_step():
    file = io.StringIO()
    with Progress(["safety", "tone"], file=file) as progress:
        progress.phase("warm_start", 2)
        progress.update(1, {"loss": 3.0})
        progress.phase("grpo", 2)
        progress.sample("p", "c")
        progress.update(
            1, {"reward/safety": 0.5, "reward/tone": math.nan, "kl": 0.01, "tokens_per_s": 12345.0}
        )
        progress.update(2, {"reward/safety": 0.75, "reward/tone": None, "memory_gib": 1.5, "other": 1})
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("warm_start 1/2  loss 3.0000  left ")
    assert lines[1].startswith("grpo 1/2  safety 0.500 (+0.000)  tone nan")
    assert "KL 0.0100  tok/s 12.3k  left " in lines[1]
    assert lines[2].startswith("grpo 2/2  safety 0.750 (+0.250)  GiB 1.50  left 0 s")


def in_a_terminal(script: str, columns: int) -> str:
    """What the script writes to a terminal of that width."""
    primary, secondary = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=secondary, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(secondary)
    output = b""
    while True:
        try:
            chunk = os.read(primary, 65536)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    process.wait()
    os.close(primary)
    return output.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_is_given_back_when_the_run_fails(columns):
    shown = in_a_terminal(
        "from grpo_fast.run.progress import Progress\n"
        "with Progress(['safety', 'actionability']) as p:\n"
        "    p.phase('grpo', 9)\n"
        "    for s in range(1, 8):\n"
        "        p.update(s, {'reward/safety': s / 10, 'reward/actionability': .5, 'loss': 1.0, 'kl': 0.1})\n"
        "    p.sample('hello \\x1b[2J\\x07', 'evil\\x1b]0;title\\x07' * 20)\n"
        "    p.message('note [bold] \\x1b[31m')\n"
        "    raise RuntimeError\n",
        columns,
    )
    assert shown.count("\x1b[?25l") == 1  # cursor hidden, and shown again after everything else
    assert shown.index("\x1b[?25h") > shown.rindex("safety")
    last = shown[shown.rindex("GRPO") :]
    for word in ("step 7/9", "safety", "0.700", "+0.600", "loss", "left"):
        assert word in last
    assert "\x07" not in shown and "\x1b[2J" not in shown and "\x1b]0" not in shown
    assert "note [bold]" in shown


def test_text_from_a_model_cannot_steer_a_terminal():
    hostile = "a\x1b[31mb\x9b2J\u202ec\u2066d\x00\x7f\ud800\r\ne\tf"
    clean = plain_text(hostile)
    assert clean == "a�[31mb�2J�c�d����\ne\tf"
    assert plain_text("a\r\n b\x07", one_line=True) == "a b�"


def test_small_numbers_are_readable():
    assert [duration(s) for s in (0, 59.4, 185, 7640)] == ["0 s", "59 s", "3 min 05 s", "2 h 07 min"]
    assert [si(v) for v in (5, 999, 12345, 2.5e6)] == ["5", "999", "12.3k", "2.5M"]
    assert sparkline([0, 1, 2, 3], 8) == "▁▃▆█" and len(sparkline(range(100), 7)) == 7
    assert sparkline([2.0, 2.0], 9) == "▁▁"


def test_what_is_logged_is_what_json_has(tmp_path):
    with create(tmp_path / "r") as log:
        log.samples(
            [{"when": "before", "step": 0, "scores": {"a": torch.tensor(float("nan")), "b": np.float64(1)}}]
        )
    text = (tmp_path / "r" / "samples.jsonl").read_text()
    assert json.loads(text)["scores"] == {"a": None, "b": 1.0}


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
def test_a_command_ends_with_one_line(raised, code, line, capsys):
    def command():
        if raised:
            raise raised

    with pytest.raises(SystemExit) as exited:
        run_command(command)
    assert exited.value.code == code and capsys.readouterr().err == line


def test_a_curve_of_any_length_keeps_its_ends_and_its_shape():
    curve, few = Curve(), Curve()
    for step in range(300):
        few.add(float(step))
    assert few.values() == [float(step) for step in range(300)]
    for step in range(10_000):
        curve.add(float(step))
    values = curve.values()
    assert curve.first == values[0] == 0.0 and curve.last == values[-1] == 9999.0
    assert len(values) <= Curve.MOST + 2 and values == sorted(values)
    assert sparkline(values, 8) == sparkline([float(step) for step in range(10_000)], 8)


def test_a_new_folder_appears_with_its_settings_or_not_at_all(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot create run folder .*No space left"):
            create(tmp_path / "r")
    assert not list(tmp_path.iterdir())
    script = (
        "import os, sys; from pathlib import Path; from grpo_fast.run.lock import begin\n"
        "os.fsync = lambda _: os._exit(9)\nbegin(Path(sys.argv[1]), 'name = 1')"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "r")], check=False).returncode == 9
    assert not (tmp_path / "r").exists()
    with create(tmp_path / "r") as log:
        log.step("grpo", 1, {"loss": 1.0})
    with pytest.raises(UserError, match="already exists; go on with it"):
        create(tmp_path / "r")


def test_a_second_signal_is_no_stop_with_everything_saved(tmp_path):
    log = create(tmp_path / "r")
    with pytest.raises(KeyboardInterrupt), log:
        log.step("grpo", 1, {"loss": 1.0})
        raise KeyboardInterrupt
    assert (tmp_path / "r" / ENDING).read_text().startswith("failed: interrupted in the middle of a step")
