"""Engine, reward and judge faults injected into real training runs: `python -m tests.endurance.faults`.

Each fault is injected once, each at a step of its own: the run must give the metrics of an undisturbed one. Then it is
injected for ever: the run must stop in time, in one line, with its steps kept, and resume to the undisturbed metrics.
Reward functions' faults are injected a third time into a run that counts failing completions as missing: it must give
the metrics of a function that returns None for them. Writes `results/faults.json` beside this file; exit code 1 where
anything went otherwise.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoModelForCausalLM

from grpo_fast.engines import guard
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import read_rows, reproducible
from grpo_fast.train import main as train_main
from tests.judge_server import JudgeServer, Reply, chat_reply, data_fields
from tests.test_engine_guard import COMPLETIONS, FAULTS, spoil
from tests.tiny import save_policy, write_prompts
from tests.vllm_server import BytesTransfer, Fault, VllmTestServer

RESULTS = Path(__file__).parent / "results" / "faults.json"
LONGEST_S = 30.0
"""Longest a fault may hold a run up; the limits of the runs below add up to far less."""
BREAK_AT = 2
"""Steps a run has taken when it is broken for ever."""

# What happens to one request of a rollout.
ENGINE: dict[str, tuple[str, Fault]] = {
    **{name: (COMPLETIONS, fault) for name, (fault, _) in FAULTS.items()},
    "another vocabulary": (
        COMPLETIONS,
        spoil(lambda choice: choice["token_ids"].__setitem__(0, 10**6)),
    ),
    "hand-over: dies": ("/update_weights", Fault(hang_up=True)),
    "hand-over: 500": ("/update_weights", Fault(status=500)),
    "hand-over: hangs": ("/update_weights", Fault(delay_s=60)),
    "hand-over: start refused": ("/start_weight_update", Fault(status=500)),
    "hand-over: end lost": ("/finish_weight_update", Fault(cut=True)),
    "pause refused": ("/pause", Fault(status=500)),
}

REWARDS = Path(__file__).with_name("fault_rewards.py")
FUNCTION = re.findall(r'if kind == "(.+)":', REWARDS.read_text(encoding="utf-8"))

JUDGE: dict[str, Reply] = {
    "500": Reply(status=500, body=b"\x1b[31m"),
    "503 and wait": Reply(status=503, headers={"Retry-After": "0"}),
    "429": Reply(status=429),
    "hangs up": Reply(hang_up=True),
    "hangs": Reply(delay_s=60),
    "drips": Reply(body=chat_reply("5"), drip_s=0.5),
    "no JSON": Reply(body=b"<html>"),
    "nothing in it": Reply(body=b"{}"),
}


class Bench:
    """A folder with a policy, prompts and rewards, in which runs are made and compared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_policy(folder / "policy", "llama")
        write_prompts(folder / "prompts.jsonl")
        shutil.copy(REWARDS, folder)
        self._straight: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        self._runs = 0

    def flags(self, *more: str, steps: int) -> list[str]:
        """A run's flags but for its name."""
        flags = f"--policy.model {self.folder / 'policy'} --data.prompts {self.folder / 'prompts.jsonl'}"
        flags += " --data.eval-size 4 --rollout.prompts-per-step 3 --rollout.group-size 4 --run.save-every 1"
        flags += f" --rollout.max-new-tokens 8 --optim.lr 1e-2 --run.steps {steps} --output-dir {self.folder}"
        return [*flags.split(), *more]

    def run(self, *flags: str) -> tuple[int, str, Path]:
        """Exit code, the last line of the errors, and the folder of a run; a new one unless it is resumed."""
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        name = [] if "--resume" in flags else ["--name", folder.name]
        errors = io.StringIO()
        code = 0
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                train_main([*flags, *name])
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0
        said = errors.getvalue().strip().splitlines()
        return code, said[-1] if said else "", folder

    def straight(self, *flags: str) -> list[dict[str, Any]]:
        """The metrics of an undisturbed run, made once."""
        if flags not in self._straight:
            code, said, folder = self.run(*flags)
            assert code == 0, said
            self._straight[flags] = metrics(folder)
        return self._straight[flags]


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a fault must not change."""
    counted = ("engine/retries", "judge/", "reward_failures/")
    rows = [reproducible(row) for row in read_rows(run / "metrics.jsonl")]
    return [{key: value for key, value in row.items() if not key.startswith(counted)} for row in rows]


@contextlib.contextmanager
def after_step(act: Callable[[int], object]) -> Iterator[None]:
    """Calls `act` with the steps taken, after each of them."""
    log = Run.step

    def step(self: Run, number: int, scalars: Any) -> None:
        log(self, number, scalars)
        act(number)

    with mock.patch.object(Run, "step", step):
        yield


def once(
    bench: Bench,
    names: Sequence[str],
    flags: Sequence[str],
    inject: Callable[[str], object],
    *,
    straight: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """One run, a fault after each of its steps: {name: what came of it}."""
    times: dict[int, float] = {}

    def act(number: int) -> None:
        times[number] = time.monotonic()
        if number <= len(names):
            inject(names[number - 1])

    steps = len(names) + 1
    want = bench.straight(*straight)
    with after_step(act):
        code, said, folder = bench.run(*flags)
    got = metrics(folder) if (folder / "metrics.jsonl").exists() else []
    outcome = {}
    for place, name in enumerate(names, start=1):
        took = times.get(place + 1, float("inf")) - times.get(place, 0.0)
        same = code == 0 and len(got) == steps and got[place : place + 1] == want[place : place + 1]
        outcome[name] = {
            "held": same and took < LONGEST_S,
            "step_s": round(took, 2),
            "said": "" if same else said,
        }
    return outcome


def for_ever(
    bench: Bench, flags: Sequence[str], inject: Callable[[], object], mend: Callable[[], object]
) -> dict[str, Any]:
    """A run that is broken for ever after BREAK_AT steps, mended and resumed: what came of it."""
    begun = [0.0]

    def act(number: int) -> None:
        if number == BREAK_AT:
            begun[0] = time.monotonic()
            inject()

    want = bench.straight(*flags)
    with after_step(act):
        code, said, folder = bench.run(*flags)
    took = time.monotonic() - begun[0]
    mend()
    stopped = code == 2 and f"{BREAK_AT} steps are kept" in said and "--resume" in said and said.isprintable()
    resumed, _, _ = bench.run("--resume", str(folder))
    same = resumed == 0 and metrics(folder) == want
    return {"held": stopped and same and took < LONGEST_S, "stop_s": round(took, 2), "said": said}


def engine_faults(bench: Bench, names: Sequence[str], *, lasting: bool = True) -> dict[str, dict[str, Any]]:
    """Faults of the engine's server."""

    def fresh() -> VllmTestServer:
        model = AutoModelForCausalLM.from_pretrained(bench.folder / "policy")
        return VllmTestServer(model, max_model_len=512)

    server = fresh()

    def flags(steps: int) -> list[str]:
        more = f"--reward.functions fault_rewards:counts_e --engine.kind vllm --engine.url {server.url}"
        more += " --engine.retries 1 --engine.timeout-s 2 --reward.isolation thread"
        return bench.flags(*more.split(), steps=steps)

    def broken(name: str, count: int) -> None:
        path, fault = ENGINE[name]
        server.faults[path] = [fault] * count if count > 1 or path != COMPLETIONS else [Fault(), fault]

    with server:
        bench.straight(*flags(len(names) + 1))
        renew(server, bench)
        given = flags(len(names) + 1)
        found = {"once": once(bench, names, given, lambda name: broken(name, 1), straight=given)}
        result = {name: {"once": found["once"][name]} for name in names}
        for name in names if lasting else ():
            renew(server, bench)
            bench.straight(*flags(4))
            renew(server, bench)
            result[name]["for ever"] = for_ever(
                bench, flags(4), lambda name=name: broken(name, 1000), server.faults.clear
            )
    return result


def renew(server: VllmTestServer, bench: Bench) -> None:
    """The server as it was at first, with its first weights."""
    server.model.load_state_dict(AutoModelForCausalLM.from_pretrained(bench.folder / "policy").state_dict())
    server.weight_version = "default"
    server.paused = server.asleep = server.updating = server.greeted = False
    server.prefixes.clear()
    server.faults.clear()


def function_faults(bench: Bench, names: Sequence[str], *, lasting: bool = True) -> dict[str, dict[str, Any]]:
    """Faults of a reward function."""
    fault = bench.folder / "fault"

    def flags(*more: str, steps: int) -> list[str]:
        own = "--reward.functions fault_rewards:counts_e --reward.timeout-s 0.5 --reward.memory-limit-gib 1"
        return bench.flags(*own.split(), *more, steps=steps)

    given = flags(steps=len(names) + 1)
    found = once(bench, names, given, lambda name: fault.write_text(f"once:{name}"), straight=given)
    result = {name: {"once": found[name]} for name in names}
    fault.unlink(missing_ok=True)
    if not lasting:
        return result
    for name in names:
        result[name]["for ever"] = for_ever(
            bench,
            flags(steps=4),
            lambda name=name: fault.write_text(f"always:{name}"),
            lambda: fault.unlink(missing_ok=True),
        )
    # the undisturbed one returns None where the others fail, after the first step as they do
    forgiving = flags("--reward.on-failure", "missing", steps=len(names) + 1)
    with after_step(lambda number: fault.write_text("none:")):
        bench.straight(*forgiving)
    fault.unlink()
    missing = once(bench, names, forgiving, lambda name: fault.write_text(f"some:{name}"), straight=forgiving)
    fault.unlink(missing_ok=True)
    for name in names:
        result[name]["missing"] = missing[name]
    return result


def judge_faults(bench: Bench, names: Sequence[str], *, lasting: bool = True) -> dict[str, dict[str, Any]]:
    """Faults of the judge's server."""
    with JudgeServer() as server:
        server.rate = lambda payload: str(min(data_fields(payload)[1].count("e"), 10))
        broken: list[Reply] = []

        class Script(list):  # what is broken for ever never comes to its end
            def __bool__(self) -> bool:
                return bool(broken) or len(self) > 0

            def pop(self, place: Any = -1) -> Reply:
                return broken[0] if broken else super().pop(place)

        server.script = Script()

        def flags(steps: int) -> list[str]:
            own = f"--judge.url {server.url} --judge.model tiny-judge --judge.rubrics e=letters"
            own += " --judge.timeout-s 1 --judge.retries 2"
            return bench.flags(*own.split(), steps=steps)

        given = flags(len(names) + 1)
        found = once(bench, names, given, lambda name: server.script.append(JUDGE[name]), straight=given)
        result = {name: {"once": found[name]} for name in names}
        for name in names if lasting else ():
            result[name]["for ever"] = for_ever(
                bench, flags(4), lambda name=name: broken.append(JUDGE[name]), broken.clear
            )
    return result


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Bench]:
    """A bench in `folder`, which is the working directory meanwhile; repetitions do not wait."""
    before, path = os.getcwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.modules.pop("fault_rewards", None)
    transfer = mock.patch(
        "grpo_fast.engines.vllm_weights.transfer_of", lambda settings, device: BytesTransfer()
    )
    try:
        with transfer, mock.patch.object(guard, "PAUSE_S", 0.01):
            yield Bench(folder)
    finally:
        os.chdir(before)
        sys.path[:] = path
        sys.modules.pop("fault_rewards", None)


def main() -> None:
    """All of them, and the record."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, prepared(Path(folder)) as bench:
        found = {
            "engine": engine_faults(bench, list(ENGINE)),
            "function": function_faults(bench, FUNCTION),
            "judge": judge_faults(bench, list(JUDGE)),
        }
        shown = json.loads(json.dumps(found).replace(folder, "RUNS"))
    cases = [(kind, name, how, result) for kind, faults in shown.items() for name, hows in faults.items()
             for how, result in hows.items()]  # fmt: skip
    failed = [
        f"{kind}: {name}, {how}: {result['said']}" for kind, name, how, result in cases if not result["held"]
    ]
    summary = {
        "faults": sum(map(len, shown.values())),
        "injections": len(cases),
        "failed": len(failed),
        "longest_s": max(result.get("stop_s", result.get("step_s")) for *_, result in cases),
        "wall_s": round(time.monotonic() - started, 1),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary | {"results": shown}, indent=1) + "\n", encoding="utf-8")
    for line in failed:
        print(line)
    print(json.dumps(summary))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
