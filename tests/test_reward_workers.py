"""Reward functions in processes of their own: what goes wrong there, which completion it is, and what is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config.settings import RewardSettings, TrainConfig
from grpo_fast.errors import UserError
from grpo_fast.rewards import process as process_module
from grpo_fast.rewards.functions import MOST_LOST, RewardFunctions
from grpo_fast.rewards.process import Worker
from grpo_fast.rewards.search import failing_rows
from grpo_fast.rewards.user_function import FunctionError
from tests.test_rewards import LOADED_FROM

MODULE = r"""
    import ctypes, os, random, signal, subprocess, sys, threading, time
    calls = 0
    def f(completions, **_):
        global calls
        calls += 1
        scores = [float(len(text)) for text in completions]
        for place, text in enumerate(completions):
            if text == "raise": raise ValueError("no\x1b[31m")
            if text == "nan": scores[place] = float("nan")
            if text == "loop":
                while True: pass
            if text == "native": ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock
            if text == "stubborn":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                while True: pass
            if text == "segfault": ctypes.string_at(0)
            if text == "exit": os._exit(3)
            if text == "leave": sys.exit(4)
            if text == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if text == "memory": bytearray(1 << 33)
            if text == "close": os.closerange(3, 1024)
            if text == "garbage":
                for pipe in range(3, 1024):
                    try: os.write(pipe, b"\0" * 7 + b"\2[]")
                    except OSError: pass
            if text == "huge answer":
                for pipe in range(3, 1024):
                    try: os.write(pipe, b"\xff" * 8)
                    except OSError: pass
        return scores
    def short(completions, **_): return [1.0] * (len(completions) - (len(completions) == 6))
    def alien(completions, **_):
        print("on the way\x1b[2J\x00", file=sys.stderr)
        os.write(1, b"\xff\xfe straight\n")
        assert sys.stdin.read() == "" and not input
        return completions
    def talks(completions, **_):
        print("one\x1b[31m"); print("x" * 300_000)
        return [float(len(sys.stdin.read()))] * len(completions)
    def spawns(completions, **_):
        child = subprocess.Popen(["sleep", "60"])
        open("child", "w").write(str(child.pid))
        return [0.0] * len(completions)
    def changes(completions, **_):
        os.chdir("/"); os.environ["CHANGED"] = "1"; random.seed(1)
        return [0.0] * len(completions)
    def kinds(completions, day, pair, deep, **_):
        return [float(d.year + p[1] + len(q["a"])) * isinstance(p, tuple) for d, p, q in zip(day, pair, deep)]
    def once(completions, **_):
        global calls
        calls += 1
        if calls == 2: raise OSError("passing")
        return [float(len(text)) for text in completions]
    def pid(completions, **_): return [float(os.getpid())] * len(completions)
"""
BATCH = ["a", "bb", "ccc", "dd", "e", "ff"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_rewards.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process_module, "GRACE_S", 0.1)


@contextmanager
def functions(*names: str, **options: Any) -> Iterator[RewardFunctions]:
    given: dict[str, Any] = {"timeout_s": 20.0}
    made = RewardFunctions([f"odd_rewards:{name}" for name in names], **(given | options))
    try:
        made.probe([])
        yield made
    finally:
        made.close()


def call(made: RewardFunctions, completions: list[str]) -> list[list[float]]:
    prompts = [f"prompt {place}" for place in range(len(completions))]
    return made(prompts, completions, [{}] * len(completions)).tolist()


def children() -> set[int]:
    listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for path in listed for pid in path.read_text().split()}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"raised ValueError: no\x1b[31m"),
        ("nan", "returned nan"),
        ("loop", "took longer than reward.timeout_s = 0.2 s"),
        ("native", "took longer than reward.timeout_s = 0.2 s"),
        ("stubborn", "took longer than reward.timeout_s = 0.2 s"),
        ("segfault", "was killed by SIGSEGV"),
        ("exit", "ended its process with exit code 3"),
        ("leave", "raised SystemExit: 4"),
        ("kill", "was killed by SIGKILL, which the system does when memory runs out"),
        ("memory", "raised MemoryError"),
        ("garbage", "sent what is no answer"),
        ("huge answer", "sent what is no answer"),
        ("close", "its process"),
    ],
)
def test_the_completion_a_function_fails_on_is_named_or_missing(fault: str, message: str):
    limits: dict[str, Any] = {
        "timeout_s": 0.2 if "took" in message else 20.0,
        "memory_limit_gib": 1.0 * (fault == "memory"),
    }
    batch = ["a", fault, "ccc", "dd"]
    with functions("f", **limits, on_failure="missing") as forgiving:
        started = time.monotonic()
        row = call(forgiving, batch)
        assert row[1][0] != row[1][0] and [row[i][0] for i in (0, 2, 3)] == [1, 3, 2]
        assert time.monotonic() - started < 8
        assert forgiving.counts() == {"reward_failures/odd_rewards:f": 1.0}
        assert call(forgiving, BATCH) == [[1.0], [2.0], [3.0], [2.0], [1.0], [2.0]]
    with functions("f", **limits) as strict, pytest.raises(UserError) as caught:
        call(strict, batch)
    text = str(caught.value)
    assert text.startswith("reward function odd_rewards:f ") and "\n" not in text and "\x1b" not in text
    assert message in text and "completion 1" in text, text


def test_what_is_about_no_single_completion():
    with (
        functions("short") as made,
        pytest.raises(UserError, match=r"returned 5 values for 6 completions \(on no completion alone\)"),
    ):
        call(made, BATCH)
    with functions("once") as made:
        told: list[str] = []
        made.attend(None, told.append)
        assert call(made, BATCH) == [[1.0], [2.0], [3.0], [2.0], [1.0], [2.0]]
        assert len(told) == 1 and "went well when it was called again" in told[0]


def test_many_batches_without_a_score_stop_the_run_that_forgives():
    with functions("f", on_failure="missing") as made:
        told: list[str] = []
        made.attend(None, told.append)
        for _ in range(MOST_LOST - 1):
            assert all(x != x for (x,) in call(made, ["raise", "raise"]))
        assert len(told) == 1 and told[0].startswith(
            "warning: reward function odd_rewards:f raised ValueError"
        )
        with pytest.raises(UserError, match=f"no score in {MOST_LOST} batches in a row"):
            call(made, ["raise", "raise"])


def test_what_is_printed_goes_to_a_file_of_limited_size(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(process_module, "LARGEST_LOG", 1 << 16)
    with functions("talks", "f") as made:
        made.attend(tmp_path, print)
        assert call(made, BATCH)[0] == [0.0, 1.0]  # standard input is at its end
    log = (tmp_path / "reward-odd_rewards-talks.log").read_text()
    assert log.startswith("one\\x1b[31m\nxxx") and len(log) < (1 << 16) + 100 and "no more is written" in log
    shown = capfd.readouterr()
    assert "one" not in shown.out + shown.err


def test_the_last_lines_printed_are_in_the_message():
    with functions("f") as made:
        worker = made._runners[0]
        assert isinstance(worker, Worker)
        worker.output.tail = b"never shown"
    with pytest.raises(UserError) as caught:
        RewardFunctions(["odd_rewards:alien"]).probe([])
    assert r'it printed "on the way\x1b[2J\x00 / \xff\xfe straight"' in str(caught.value)


def test_nothing_of_the_trainer_is_touched_and_nothing_is_left(tmp_path: Path):
    gc.collect()  # ends workers that other tests left to it
    descriptors = len(os.listdir("/proc/self/fd"))
    before = children()
    with functions("changes", "spawns") as made:
        child = int((tmp_path / "child").read_text())
        call(made, BATCH)
        assert len(children() - before) == 2
    assert os.getcwd() == str(tmp_path) and "CHANGED" not in os.environ
    assert children() == before and len(os.listdir("/proc/self/fd")) == descriptors
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_columns_arrive_as_they_are_and_what_cannot_travel_is_named():
    made = RewardFunctions(["odd_rewards:kinds"])
    row = {"day": date(2020, 1, 1), "pair": (1, 2), "deep": {"a": [1]}}
    assert made(["p"], ["c\ud800"], [row]).tolist() == [[2023.0]]
    with pytest.raises(
        UserError, match=r"column 'deep' cannot be sent to another process .* --reward.isolation thread"
    ):
        made(["p"], ["c"], [row | {"deep": {"a": lambda: None}}])
    made.close()


def test_a_worker_dies_with_the_trainer_and_imports_no_torch(tmp_path: Path):
    program = (
        "import os, signal, sys\n"
        "from grpo_fast.rewards.process import Worker\n"
        "worker = Worker('odd_rewards:pid', timeout_s=20)\n"
        "worker.ready()\n"
        "print(int(worker.call({'completions': ['a']}, 1, None, 20)['pid'][0]), flush=True)\n"
        "assert 'torch' not in sys.modules\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, LOADED_FROM))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=50)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 5
    while (stat := Path(f"/proc/{int(done.stdout)}/stat")).exists() and " Z " not in stat.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_search_is_bounded_and_finds_every_row():
    tried: list[list[int]] = []

    def attempt(rows: list[int], limit_s: float) -> FunctionError | None:
        tried.append(rows)
        return FunctionError("bad") if {3, 9} & {*rows} else None

    found = failing_rows(attempt, 16, limit_s=60.0, first_only=False)
    assert [*found.rows] == [3, 9] and not found.undecided and len(tried) < 20
    assert [*failing_rows(attempt, 16, limit_s=60.0, first_only=True).rows] == [3]
    assert [*failing_rows(attempt, 1, limit_s=60.0, first_only=True).rows] == []

    def slow(rows: list[int], limit_s: float) -> FunctionError:
        now[0] += limit_s
        return FunctionError("late")

    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_fast.rewards.search.time.monotonic", lambda: now[0])
        found = failing_rows(slow, 64, limit_s=60.0, first_only=False)
    assert now[0] < 5 * 60 and found.rows and len(found.rows) + len(found.undecided) == 64


def test_a_fast_function_costs_little():
    texts = ["x" * 2000 + str(i) for i in range(256)]
    with functions("f") as made:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            made(["p"] * 256, texts, [{"answer": "x"}] * 256)
            seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05


def test_threads_can_neither_forgive_nor_be_limited():
    given: list[dict[str, Any]] = [{"on_failure": "missing"}, {"memory_limit_gib": 1.0}]
    for setting in given:
        with pytest.raises(
            ValueError, match=rf"reward.{next(iter(setting))}.* needs reward.isolation = process"
        ):
            TrainConfig(reward=RewardSettings(isolation="thread", **setting))
