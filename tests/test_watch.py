"""Looking on at a run: what is read while another process writes, how it stands, and nothing in it that is obeyed."""

import io
import json
import os
import time
from typing import Any

import pytest
from rich.console import Console

from grpo_fast import watch
from grpo_fast.config.command_line import TRAIN, parse
from grpo_fast.errors import UserError
from grpo_fast.run.follow import ENDING, Tail, note_ending, standing
from grpo_fast.run.metrics import RunLogger, write_atomically
from grpo_fast.watch import Watched, follow


def row(step: int, **values: Any) -> str:
    fixed = {
        "phase": "grpo",
        "step": step,
        "time_s": 2.0 * step,
        "time/step_s": 2.0,
        "reward/safety": 0.1 * step,
    }
    return json.dumps(fixed | values) + "\n"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("[run]\nsteps = 10\n")
    return folder


def log(folder, text):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def shown(watched, width=100):
    watched.look()
    console = Console(file=io.StringIO(), width=width)
    console.print(watched.panel(width))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def steps(rows):
    return [found["step"] for found in rows]


def test_a_half_written_line_waits(run):
    tail = Tail(run / "metrics.jsonl")
    assert tail.read() == ([], False)  # no file yet
    log(run, row(1) + row(2)[:20])
    assert steps(tail.read()[0]) == [1]
    assert tail.read() == ([], False)
    log(run, row(2)[20:])
    assert steps(tail.read()[0]) == [2] and tail.broken == 0


def test_only_what_is_new_is_read(run):
    tail, path = Tail(run / "metrics.jsonl"), run / "metrics.jsonl"
    log(run, row(1) + row(2))
    tail.read()
    with path.open("r+") as file:
        file.write("#" * (len(row(1)) - 1))  # what has been read is not looked at again
    log(run, row(3))
    assert steps(tail.read()[0]) == [3] and tail.broken == 0


@pytest.mark.parametrize("replaced", [True, False], ids=["renamed over", "truncated"])
def test_a_log_that_begins_anew_is_read_anew(run, replaced):
    tail, path = Tail(run / "metrics.jsonl"), run / "metrics.jsonl"
    log(run, row(1) + row(2) + row(3))
    tail.read()
    text = row(1) + row(2, loss=1.5) + row(3) + row(4)  # longer than what was read
    write_atomically(path, text) if replaced else path.write_text(text)
    rows, anew = tail.read()
    assert anew and steps(rows) == [1, 2, 3, 4] and rows[1]["loss"] == 1.5


def test_what_is_no_row_is_left_out(run):
    log(
        run,
        "nonsense\n[1]\n"
        + "[" * 100_000
        + "\n"
        + row(1)
        + '{"phase": 3, "step": "x"}\n'
        + row(2, kl=10**400),
    )
    watched = Watched(run)
    text = shown(watched)
    assert (
        watched.step == 2 and watched.history["reward/safety"] == [0.1, 0.2] and "kl" not in watched.history
    )
    assert "no JSON: 3" in text


def test_a_pipe_in_the_place_of_a_log_is_not_waited_for(run):
    os.mkfifo(run / "metrics.jsonl")
    assert Tail(run / "metrics.jsonl").read() == ([], False)


def test_the_numbers_of_the_last_step(run):
    more = {"kl": 0.25, "entropy": 1.5, "grad_norm": 0.5, "length_mean": 31.0, "mismatch_mean": 1e-6}
    log(run, row(1, phase="warm_start", **{"warning/old": 1.0}) + row(1) + row(2, **{"warning/outside": 1.0}))
    log(run, row(3, tokens_per_s=12345.0, memory_gib=1.25, skipped_updates=2, **more))
    watched = Watched(run)
    text = shown(watched)
    for said in ("step 3/10", "0.300", "+0.200", "KL 0.2500", "entropy 1.500", "grad norm 0.5", "length 31"):
        assert said in text
    for said in ("mismatch 1.0e-06", "tok/s 12.3k", "GiB 1.25", "s/step 2", "outside (step 2)", "skipped: 2"):
        assert said in text
    assert (
        "old" not in text and 12 <= float(watched.left().split()[0]) <= 14
    )  # 7 steps of 2 s, less what has passed


def test_the_phases_before_grpo_show_their_loss(run):
    log(run, row(1, phase="reward_model", loss=2.0, **{"loss/tone": 1.5}).replace("reward/safety", "other"))
    text = shown(Watched(run))
    assert "reward model" in text and "tone" in text and "– left" in text


@pytest.mark.parametrize("width", [12, 30, 47, 48, 80, 200])
def test_no_line_is_wider_than_the_terminal(run, width):
    log(run, row(1, **{"reward/" + "long" * 30: 0.5, "kl": 0.1}) + row(2, **{"warning/" + "x" * 90: 1.0}))
    (run / "samples.jsonl").write_text(json.dumps({"prompt": "p" * 500, "completion": "c " * 500}) + "\n")
    text = shown(Watched(run), width)
    assert max(map(len, text.splitlines())) <= width and ("0.500" in text or width == 12)


def test_nothing_from_the_run_is_obeyed(run, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}[red]x"
    (run / "samples.jsonl").write_text(json.dumps({"prompt": evil, "completion": evil + "\ud800"}) + "\n")
    note_ending(run, UserError(evil))
    text = ""
    for last in (row(1, phase=evil), row(2, **{f"reward/{evil}": 0.5, f"warning/{evil}": 1.0})):
        log(run, last)
        assert follow(run) == 0
        text += shown(Watched(run)) + capsys.readouterr().out
    assert text.count("[red]x") >= 8 and not set(text) & set("\x1b\x07\ud800\N{RIGHT-TO-LEFT OVERRIDE}")


def test_a_resumed_run_is_shown_from_its_new_log(run):
    log(run, row(1) + row(2) + row(3, **{"warning/outside": 1.0}))
    watched = Watched(run)
    assert "outside" in shown(watched)
    write_atomically(run / "metrics.jsonl", row(1) + row(2))
    text = shown(watched)
    assert "step 2/10" in text and "outside" not in text and watched.history["reward/safety"] == [0.1, 0.2]


def test_how_a_run_stands(run):
    log(run, row(1))
    assert standing(run, patience_s=60).state == "running"
    for path in run.iterdir():
        os.utime(path, (time.time() - 100, time.time() - 100))
    how = standing(run, patience_s=60)
    assert how.state == "silent" and 99 < how.age_s < 110 and not how.over
    note_ending(run, UserError("disk full"))
    assert standing(run, patience_s=60).state == "failed" and "disk full" in watch.told(
        standing(run, patience_s=60)
    )
    note_ending(run)
    assert standing(run, patience_s=60).state == "stopped"
    (run / ENDING).unlink()
    for status, state in (("interrupted", "stopped"), ("finished", "finished")):
        (run / "summary.json").write_text(json.dumps({"status": status}))
        assert standing(run, patience_s=60).state == state


def test_a_run_that_fails_says_why_until_it_goes_on(tmp_path):
    logger = RunLogger.create(tmp_path / "run", config_toml="")
    with pytest.raises(UserError), logger:
        logger.step("grpo", 1, {})
        raise UserError("reward function x:y\nraised")
    assert (tmp_path / "run" / ENDING).read_text() == "failed: reward function x:y raised\n"
    with RunLogger.resume(tmp_path / "run", phase="grpo", step=1) as logger:
        assert (tmp_path / "run" / ENDING).exists()  # nothing is changed before something is logged
        logger.step("grpo", 2, {})
        assert not (tmp_path / "run" / ENDING).exists()


def played(monkeypatch, *scenes):
    """The scenes are played one after the other, where the watcher sleeps; then Ctrl-C."""
    coming = list(scenes)

    def sleep(_):
        if not coming:
            raise KeyboardInterrupt
        coming.pop(0)()

    monkeypatch.setattr(watch.time, "sleep", sleep)


def test_plain_output_is_one_line_a_step(run, monkeypatch, capsys):
    log(run, row(1) + row(2))
    resumed = row(1) + row(2, time_s=9.0) + row(3)  # step 1 was kept, step 2 taken anew
    played(
        monkeypatch,
        lambda: log(run, row(3)),
        lambda: None,
        lambda: write_atomically(run / "metrics.jsonl", resumed),
        lambda: (run / "summary.json").write_text('{"status": "finished"}'),
    )
    assert follow(run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == [f"grpo {step}/10" for step in (1, 2, 3, 2, 3)][
        :5
    ] or lines
    assert lines[-1].startswith("finished") and sum(line.startswith("grpo 1/10") for line in lines) == 1


def test_ctrl_c_ends_with_0(run, monkeypatch):
    played(monkeypatch)
    assert follow(run, file=io.StringIO()) == 0


def test_a_terminal_is_redrawn_and_given_back(run, monkeypatch):
    log(run, row(1))
    terminal = io.StringIO()
    monkeypatch.setattr(watch, "Terminal", lambda file: Console(file=file, force_terminal=True, width=80))
    played(monkeypatch, lambda: log(run, row(2)))
    assert follow(run, file=terminal) == 0
    text = terminal.getvalue()
    assert "step 1/10" in text and "step 2/10" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("words", [["missing"], ["empty"], []])
def test_a_run_that_is_none_is_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        watch.main(words)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_train_hands_over(run, monkeypatch, capsys):
    from grpo_fast import train, train_reward

    log(run, row(1))
    (run / "summary.json").write_text('{"status": "finished"}')
    for command in (train, train_reward):
        with pytest.raises(SystemExit) as stop:
            command.main(["--watch", str(run)])
        assert stop.value.code == 0 and "grpo 1/10" in capsys.readouterr().out
    with pytest.raises(UserError, match="stands alone"):
        parse(["--watch", str(run), "--seed", "1"], TRAIN)
