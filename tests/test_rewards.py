"""Reward functions: what they may return, what is refused and how, time limits, weights."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import grpo_kernels
import pytest
import torch

import grpo_fast
from grpo_fast.config.settings import RewardSettings
from grpo_fast.data.prompts import Row
from grpo_fast.errors import UserError
from grpo_fast.rewards.functions import (
    RewardFunctions,
    combine_names,
    objective_weights,
)
from grpo_fast.rewards.user_function import load_function

LOADED_FROM = [Path(module.__file__ or "").parents[1] for module in (grpo_fast, grpo_kernels)]

MODULE = """
    import asyncio, threading, time

    def length(completions, **kwargs):
        return [float(len(text)) for text in completions]
    def strict(prompts, completions, answer):
        return [a == c for a, c in zip(answer, completions)]
    def several(completions, **_):
        import torch
        return {"short": [1, 2.5], "long": torch.tensor([3.0, 4.0])}
    def rows(completions, **_):
        import numpy
        return [{"polite": 1.0, "safe": None}, {"polite": numpy.float32(2), "safe": 3}]
    def missing(completions, **_):
        return [None, 1]
    async def later(completions, **_):
        import numpy
        await asyncio.sleep(0.01)
        return numpy.ones(len(completions))
    class Late:
        async def __call__(self, completions, **_):
            return [0.5] * len(completions)
    late = Late()
    def grad_off(completions, **_):
        import torch
        return [float(torch.is_grad_enabled())] * len(completions)

    def raises(**_): raise KeyError("gold")
    def leaves(**_): raise SystemExit(3)
    def hangs(**_): time.sleep(60)
    def wrong_length(**_): return [1.0]
    def nan(**_): return [1.0, float("nan")]
    def infinite(**_): return [1.0, 1e300]
    def text(**_): return [1.0, "2.0"]
    def word(**_): return "great"
    def one(**_): return 1.0
    def nothing(**_): return None
    def nan_named(**_): return {"good": [float("nan"), 1.0]}
    def no_names(**_): return {}
    def number_names(**_): return {1: [1.0, 2.0]}
    def mixed(**_): return [{"a": 1.0}, 2.0]
    def nested(**_): return [[1.0], [2.0]]
    def positional(prompts, /, completions): return [0, 0]
    def scores(**_): return {"length": [1, 2]}
    calls = []
    def changing(**_):
        calls.append(1)
        return {f"name{len(calls)}": [1, 2]}
    barrier = threading.Barrier(3)
    def meet(**_):
        barrier.wait(20)
        return [0, 0]
    def meet2(**_): return meet()
    def meet3(**_): return meet()
    running = []
    def alone(**_):
        running.append(1)
        time.sleep(0.02)
        return [len(running), running.pop()]
    def alone2(**_): return alone()
    def alone3(**_): return alone()
    constant = 3
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "broken_rewards.py").write_text("import no_such_package_anywhere\n")
    (tmp_path / "wrong_rewards.py").write_text("def f(:\n")
    (tmp_path / "raising_rewards.py").write_text("\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in ("my_rewards", "broken_rewards", "wrong_rewards", "raising_rewards"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def score(*names: str, isolation: str = "thread", **options: Any) -> tuple[list[str], list[list[float]]]:
    specs = [f"my_rewards:{name}" for name in names]
    functions = RewardFunctions(specs, isolation=isolation, **options)
    matrix = functions(["p", "q"], ["one", "three"], [{"answer": "one"}, {"answer": "two", "only": 1}])
    functions.close()
    assert matrix.dtype == torch.float32 and functions.names is not None
    return functions.names, matrix.tolist()


def test_what_a_function_may_return():
    light = score("strict", "length", isolation="process")
    assert light == (["strict", "length"], [[1.0, 3.0], [0.0, 5.0]])
    names, matrix = score("several", "rows", "later", "late", isolation="process")
    assert names == ["short", "long", "polite", "safe", "later", "late"]
    assert matrix[1] == [2.5, 4.0, 2.0, 3.0, 1.0, 0.5] and math.isnan(matrix[0][3])
    assert score("length") == (["length"], [[3.0], [5.0]])
    assert score("strict") == (["strict"], [[1.0], [0.0]])
    assert score("several", "length") == (["short", "long", "length"], [[1.0, 3.0, 3.0], [2.5, 4.0, 5.0]])
    names, matrix = score("rows", "missing")
    assert names == ["polite", "safe", "missing"]
    assert matrix[1] == [2.0, 3.0, 1.0] and matrix[0][0] == 1.0 and all(map(math.isnan, matrix[0][1:]))
    assert score("later", "late", "grad_off") == (["later", "late", "grad_off"], [[1.0, 0.5, 0.0]] * 2)


def test_no_functions_give_no_columns():
    functions = RewardFunctions([])
    assert functions.names == [] and functions(["p"], ["c"], [{}]).shape == (1, 0)


def test_columns_arrive_as_lists_with_none_where_a_row_lacks_one():
    seen = {}

    def record(**given: list) -> list[float]:
        seen.update(given)
        return [0.0, 0.0]

    load_function("my_rewards:length")
    sys.modules["my_rewards"].record = record  # pyright: ignore
    score("record")
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["one", "three"],
        "answer": ["one", "two"],
        "only": [None, 1],
    }


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised KeyError: 'gold' ("),
        ("leaves", "raised SystemExit: 3"),
        ("wrong_length", "returned 1 values for 2 completions"),
        ("nan", "returned nan for completion 1, must be a finite number, or None"),
        ("infinite", "returned 1e+300 for completion 1"),
        ("text", "returned '2.0' for completion 1"),
        ("word", "returned 'great', must be 2 numbers, one a completion"),
        ("one", "returned 1.0, must be 2 numbers"),
        ("nothing", "returned None, must be 2 numbers"),
        ("nan_named", "returned nan of 'good' for completion 0"),
        ("no_names", "returned a dict without names"),
        ("number_names", "the name 1, which must be a text"),
        ("mixed", "returned {'a': 1.0} for completion 0"),
        ("nested", "returned [1.0] for completion 0"),
    ],
)
def test_a_bad_return_is_one_line_that_names_function_and_completion(name: str, message: str, isolation: str):
    with pytest.raises(UserError) as caught:
        score(name, isolation=isolation)
    text = str(caught.value)
    assert text.startswith(f"reward function my_rewards:{name} ") and message in text and "\n" not in text


def test_names_may_not_change_or_clash():
    functions = RewardFunctions(["my_rewards:changing"], isolation="thread")
    functions(["p", "q"], ["c", "d"], [{}, {}])
    with pytest.raises(UserError, match="returned name2, but name1 before"):
        functions(["p", "q"], ["c", "d"], [{}, {}])
    with pytest.raises(UserError, match="my_rewards:scores: another function gives 'length' already"):
        score("length", "scores")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "no module no_such_module, neither in"),
        (
            "broken_rewards:f",
            "importing broken_rewards failed: ModuleNotFoundError: .*no_such_package_anywhere",
        ),
        ("wrong_rewards:f", "importing wrong_rewards failed: SyntaxError"),
        ("raising_rewards:f", r"ZeroDivisionError: division by zero \(.*raising_rewards.py:2\)"),
        ("my_rewards:lenght", "my_rewards has no lenght; did you mean length"),
        ("my_rewards:constant", "constant must be a function, it is of type int"),
        ("my_rewards:late.nothing", "my_rewards has no late.nothing"),
    ],
)
def test_a_function_that_is_not_there(spec: str, message: str):
    with pytest.raises(UserError, match=message):
        load_function(spec)
    with pytest.raises(UserError, match=message):
        RewardFunctions([spec])


def test_signatures_that_cannot_be_called():
    with pytest.raises(UserError, match="must be accepted by name"):
        score("positional", isolation="process")
    with pytest.raises(
        UserError, match=r"needs 'answer', there are prompts, completions, answers; did you mean answers\?"
    ):
        RewardFunctions(["my_rewards:strict"])(["p"], ["c"], [{"answers": 1}])


def test_the_time_limit_ends_the_wait():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"my_rewards:hangs took longer than reward.timeout_s = 0.3 s"):
        score("length", "hangs", timeout_s=0.3)
    assert time.monotonic() - start < 3
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("reward "))


def test_a_function_that_hangs_does_not_hold_the_interpreter(tmp_path: Path):
    code = (
        "from grpo_fast.rewards.functions import RewardFunctions\n"
        "try: RewardFunctions(['my_rewards:hangs'], timeout_s=0.2, isolation='thread')(['p'], ['c'], [{}])\n"
        "except ValueError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, LOADED_FROM))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0 and "took longer" in done.stdout


def test_functions_run_at_the_same_time_up_to_the_number_of_workers():
    score("meet", "meet2", "meet3")  # each waits for the other two
    _, matrix = score("alone", "alone2", "alone3", workers=1)
    assert matrix[0] == [1.0, 1.0, 1.0]


def test_probe_finds_names_and_failures_with_two_rows():
    rows = [Row("a", {"answer": "x"}, "f:1"), Row([{"role": "user", "content": "b"}], {"answer": "y"}, "f:2")]
    assert RewardFunctions(["my_rewards:strict", "my_rewards:rows"]).probe([*rows, *rows]) == [
        "strict",
        "polite",
        "safe",
    ]
    assert RewardFunctions(["my_rewards:length"]).probe([]) == ["length"]
    with pytest.raises(UserError, match="KeyError"):
        RewardFunctions(["my_rewards:raises"]).probe(rows)


def test_weights_and_directions():
    names = ["safety", "length"]
    assert objective_weights(names, RewardSettings()).tolist() == [1.0, 1.0]
    given = RewardSettings(weights={"length": 0.5, "safety": -2.0}, directions={"length": "min"})
    assert objective_weights(names, given).tolist() == [-2.0, -0.5]
    with pytest.raises(
        UserError, match=r"reward.weights names 'safty', .* safety, length; did you mean safety\?"
    ):
        objective_weights(names, RewardSettings(weights={"safty": 1.0}))
    with pytest.raises(UserError, match=r"reward.directions names 'x'"):
        objective_weights(names, RewardSettings(directions={"x": "min"}))
    with pytest.raises(UserError, match=r"reward.weights has no length"):
        objective_weights(names, RewardSettings(weights={"safety": 1.0}))


def test_names_of_heads_rubrics_and_functions():
    assert combine_names(["safety"], ["kind"], ["length"]) == ["safety", "kind", "length"]
    with pytest.raises(UserError, match="'safety' is a head of the reward model and a reward function's too"):
        combine_names(["safety"], [], ["safety"])
    with pytest.raises(UserError, match="'safety' is a head of the reward model and a rubric too"):
        combine_names(["safety"], ["safety"], [])
    with pytest.raises(UserError, match="'kind' is a rubric and a reward function's too"):
        combine_names([], ["kind"], ["kind"])


def test_objectives_of_which_less_is_better_are_lowered_unless_the_settings_say_otherwise():
    names, lower = ["harm", "help"], ["harm"]
    assert objective_weights(names, RewardSettings(), lower).tolist() == [-1.0, 1.0]
    given = RewardSettings(directions={"harm": "max"})
    assert objective_weights(names, given, lower).tolist() == [1.0, 1.0]
