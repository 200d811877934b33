"""What an engine gets wrong is tried again within limits, ends in one line, and costs no step that was taken."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_fast.engines import guard as guard_module
from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.faults import EngineError
from grpo_fast.engines.guard import Guard, fault
from grpo_fast.engines.local import LocalEngine
from grpo_fast.errors import UserError
from grpo_fast.run.metrics import read_rows, reproducible
from grpo_fast.train import main
from tests.families import VOCAB, ragged, tiny_model
from tests.tiny import save_policy, write_prompts
from tests.vllm_server import BytesTransfer, Fault, VllmTestServer, engine_for

PROMPTS = ragged(groups=3)[0]
STOPS = (3, 4, 5)
SAMPLING = Sampling(max_new_tokens=5, stop_token_ids=STOPS)
COMPLETIONS = "/v1/completions"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(guard_module, "PAUSE_S", 0.01)


def texts(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


def guarded(server: VllmTestServer, *, retries: int = 2, **settings: Any) -> Guard:
    model = copy.deepcopy(server.model)
    engine = engine_for(server, **({"timeout_s": 5.0, "max_rows": 2} | settings))
    guard = Guard(engine, vocabulary=VOCAB, retries=retries, weights=model.named_parameters)
    guard.push(model.named_parameters(), 7)
    return guard


def spoil(place: Callable[[dict[str, Any]], object]) -> Fault:
    """A fault in the first completion of an answer."""
    return Fault(change=lambda answer: place(answer["choices"][0]))


FAULTS: dict[str, tuple[Fault, str]] = {
    "dies mid-request": (Fault(hang_up=True), "no connection or a broken one"),
    "truncated": (Fault(cut=True), "no connection or a broken one"),
    "hangs": (Fault(delay_s=60), "engine.timeout_s = 1 s"),
    "500": (Fault(status=500, body=b"EngineDeadError\n\n at line 1"), "answered 500 'EngineDeadError"),
    "overloaded": (Fault(status=429), "answered 429"),
    "no JSON": (Fault(body=b"<html>"), "no JSON object: '<html>'"),
    "another JSON": (Fault(body=b"[1]"), "no JSON object"),
    "nothing in it": (Fault(body=b"{}"), "KeyError('choices')"),
    "huge": (Fault(body=b" " * (3 << 20)), "larger than"),
    "fewer": (Fault(change=lambda answer: answer["choices"].pop()), "completions came back where"),
    "the same twice": (spoil(lambda c: c.update(index=1)), "completions came back where"),
    "stale": (spoil(lambda c: c["weight_versions"][0].update(version="6")), "drawn from weights 6"),
    "between two": (
        spoil(lambda c: c["weight_versions"].append({"version": "6", "start": 1, "end": 2})),
        "drawn from weights -1",
    ),
    "NaN": (spoil(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, float("nan"))), "log-prob nan"),
    "null": (spoil(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None)), "log-prob nan"),
    "minus infinity": (
        spoil(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, -9999.0)),
        "log-prob nan",
    ),
    "a log-prob too few": (spoil(lambda c: c["logprobs"]["token_logprobs"].pop()), "log-probs of"),
    "another vocabulary": (
        spoil(lambda c: c["token_ids"].__setitem__(0, VOCAB)),
        f"token {VOCAB}, the policy's vocabulary ends at {VOCAB - 1}",
    ),
    "negative": (spoil(lambda c: c["token_ids"].__setitem__(0, -1)), "token -1"),
    "texts for tokens": (spoil(lambda c: c["token_ids"].__setitem__(0, "a")), "no whole numbers"),
    "another tokenisation": (spoil(lambda c: c.update(prompt_token_ids=[1])), "read another prompt"),
    "no token": (
        spoil(lambda c: (c["token_ids"].clear(), c["logprobs"]["token_logprobs"].clear())),
        "log-probs of 0 came",
    ),
    "aborted": (spoil(lambda c: c.update(finish_reason="abort")), "ended by 'abort'"),
    "says it stopped": (
        spoil(lambda c: c.update(finish_reason="stop", token_ids=[9] * len(c["token_ids"]))),
        "ends with no stop token",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_tried_again_and_ends_in_one_line(name: str) -> None:
    """Once: the same completions, each group reported once. For ever: one line, and nothing hangs."""
    broken, message = FAULTS[name]
    with VllmTestServer(tiny_model("qwen2")) as server:
        guard = guarded(server, timeout_s=1.0 if name == "hangs" else 5.0)
        want = texts(guard.generate(PROMPTS, 2, SAMPLING, seed=1))
        assert guard.counts() == {"engine/retries": 0.0}

        server.faults[COMPLETIONS] = [Fault(), Fault(), broken]
        seen: list[int] = []
        completions = guard.generate(
            PROMPTS, 2, SAMPLING, 1, on_group=lambda prompt, group: seen.append(prompt)
        )
        assert texts(completions) == want and {c.version for c in completions} == {7}
        assert seen == list(range(len(PROMPTS)))
        assert guard.counts() == {"engine/retries": 1.0}

        server.faults[COMPLETIONS] = [broken] * 100
        seen.clear()
        started = time.monotonic()
        with pytest.raises(UserError) as given_up:
            guard.generate(PROMPTS, 2, SAMPLING, 2, on_group=lambda prompt, group: seen.append(prompt))
        assert time.monotonic() - started < 15
        assert "a rollout failed 3 times (engine.retries = 2), the last time: " in str(given_up.value)
        assert message in str(given_up.value) and "\n" not in str(given_up.value)
        assert str(given_up.value).endswith(f"; see that the server at {server.url} is well")
        assert not seen and guard.counts() == {"engine/retries": 3.0}
        server.faults.clear()
        assert texts(guard.generate(PROMPTS, 2, SAMPLING, 1)) == want  # the engine is not left broken
        guard.close()


def test_groups_that_came_are_not_asked_for_again() -> None:
    with VllmTestServer(tiny_model("qwen2")) as server:
        guard = guarded(server)
        server.payloads.clear()
        server.faults[COMPLETIONS] = [Fault(), Fault(), Fault(hang_up=True)]
        guard.generate(PROMPTS, 2, SAMPLING, 1)
        asked = [tuple(body["prompt"]) for body in server.payloads if body["max_tokens"] > 1]
        assert asked == [tuple(prompt) for prompt in PROMPTS]


def test_a_server_that_was_replaced_gets_the_weights_again() -> None:
    model = tiny_model("qwen2")
    policy = copy.deepcopy(model)
    with torch.no_grad():
        policy.base_model.layers[0].mlp.up_proj.weight.mul_(-1)
    with VllmTestServer(copy.deepcopy(model)) as server:
        engine = engine_for(server, timeout_s=5.0)
        guard = Guard(engine, vocabulary=VOCAB, retries=1, weights=policy.named_parameters)
        guard.push(policy.named_parameters(), 3)
        want = texts(guard.generate(PROMPTS, 2, SAMPLING, 1))
        port = int(server.url.rpartition(":")[2])
    with pytest.raises(UserError, match=r"failed 2 times .* no connection"):
        guard.generate(PROMPTS, 2, SAMPLING, 1)
    with VllmTestServer(copy.deepcopy(model), port=port) as server:
        assert texts(guard.generate(PROMPTS, 2, SAMPLING, 1)) == want
        assert server.weight_version == "3"
        guard.close()


def test_a_hand_over_is_tried_again_too() -> None:
    with VllmTestServer(tiny_model("qwen2")) as server:
        guard = guarded(server)
        model = tiny_model("qwen2")
        server.faults["/update_weights"] = [Fault(), Fault(hang_up=True)]
        guard.push(iter(list(model.named_parameters())), 8)
        assert server.weight_version == "8" and guard.counts() == {"engine/retries": 1.0}
        server.faults["/update_weights"] = [Fault(status=500)] * 100
        with pytest.raises(UserError, match=r"hand-over of the weights failed 3 times .*/update_weights"):
            guard.push(model.named_parameters(), 9)


def test_what_cannot_pass_is_not_tried_again() -> None:
    with VllmTestServer(tiny_model("qwen2")) as server:
        guard = guarded(server)
        server.faults[COMPLETIONS] = [Fault(status=400, body=b"no such field")]
        with pytest.raises(UserError, match=r"answered 400 'no such field'"):
            guard.generate(PROMPTS, 2, SAMPLING, 1)

        def full(prompt: int, group: list[Completion]) -> None:
            raise UserError("the disk is full")

        with pytest.raises(UserError, match=r"^the disk is full$"):
            guard.generate(PROMPTS, 2, SAMPLING, 1, on_group=full)
        assert guard.counts() == {"engine/retries": 0.0}


def test_the_engine_in_this_process() -> None:
    model = tiny_model("qwen2")
    guard = Guard(LocalEngine(model), vocabulary=VOCAB, retries=2, weights=model.named_parameters)
    guard.push([], 2)
    seen: list[int] = []
    completions = guard.generate(PROMPTS, 2, SAMPLING, 1, on_group=lambda prompt, group: seen.append(prompt))
    assert {c.version for c in completions} == {2} and sorted(seen) == list(range(len(PROMPTS)))
    assert guard.counts() == {}
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="the policy's weights are damaged"):
        guard.generate(PROMPTS, 2, SAMPLING, 1)


def test_engines_that_lie_about_the_whole() -> None:
    """Fewer completions in the end than were reported, and groups that were never reported."""
    good = Completion([9, 3], torch.tensor([-1.0, -2.0]), "stop", 0)

    class Odd:
        def __init__(self, report: bool, count: int) -> None:
            self.report, self.count = report, count

        def generate(self, prompts, n, sampling, seed, *, places=None, on_group=None):
            for prompt in range(len(prompts)):
                if self.report and on_group:
                    on_group(prompt, [good] * n)
            return [good] * self.count

    for odd, message in ((Odd(True, 3), "3 completions came where 4"), (Odd(False, 4), "never reported")):
        with pytest.raises(UserError, match=message):
            Guard(odd, vocabulary=VOCAB).generate([[1], [2]], 2, SAMPLING, 0)  # pyright: ignore[reportArgumentType]


def test_faults_of_one_completion() -> None:
    good = Completion([9, 8, 3], torch.tensor([-1.0, -2.0, 0.0]), "stop", 1)

    def found(completion: Completion = good, sampling: Sampling = SAMPLING) -> str:
        return fault(completion, sampling, version=1, vocabulary=VOCAB)

    assert found() == ""
    assert found(replace(good, token_ids=[9] * 5, logprobs=-torch.ones(5), finish_reason="length")) == ""
    for changes, message in (
        ({"version": 0}, "weights 0"),
        ({"token_ids": [9, 3, 3]}, "goes on after a stop token"),
        ({"finish_reason": "length"}, "says it was cut"),
        ({"token_ids": [9, 9, 9], "finish_reason": "length"}, "was cut after 3 tokens"),
        ({"token_ids": [9] * 6, "logprobs": -torch.ones(6)}, "more than max_new_tokens"),
        ({"logprobs": torch.tensor([-1.0, 0.5, -1.0])}, "log-prob 0.5 at token 1"),
        ({"logprobs": torch.tensor([-1.0, -1.0, float("-inf")])}, "log-prob -inf at token 2"),
    ):
        assert message in found(replace(good, **changes)), message


# ---- a whole run ----


REWARDS = '''
def counts_e(prompts, completions, **columns):
    """Prefers one letter."""
    return [sum(letter == "e" for letter in text) / 16 for text in completions]
'''


def run_command(*flags: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    return stop.value.code if isinstance(stop.value.code, int) else 0


@pytest.fixture
def with_bytes(tmp_path, monkeypatch) -> Path:
    """A folder with a policy and a reward, and weights that go to the server inside the requests: on a CPU there is
    no other way, so `transfer_of` is what a test replaces."""
    (tmp_path / "vllm_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("vllm_rewards", None)
    monkeypatch.setattr(
        "grpo_fast.engines.vllm_weights.transfer_of", lambda settings, device: BytesTransfer()
    )
    save_policy(tmp_path / "policy", "llama")
    write_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def flags_of(folder: Path, server: VllmTestServer, name: str) -> list[str]:
    flags = f"--policy.model {folder / 'policy'} --data.prompts {folder / 'prompts.jsonl'} --data.eval-size 4"
    flags += " --reward.functions vllm_rewards:counts_e --rollout.prompts-per-step 3 --rollout.group-size 4"
    flags += f" --rollout.max-new-tokens 8 --optim.lr 1e-2 --run.steps 4 --run.save-every 1 --name {name}"
    flags += f" --output-dir {folder} --engine.kind vllm --engine.url {server.url} --engine.retries 1"
    return flags.split()


def test_a_run_with_a_server_and_one_that_loses_it_in_the_middle(with_bytes, capsys) -> None:
    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(with_bytes / "policy")

    def metrics(name: str) -> list[dict]:
        rows = read_rows(with_bytes / name / "metrics.jsonl")
        assert all("engine/retries" in row for row in rows)
        return [{k: v for k, v in reproducible(row).items() if k != "engine/retries"} for row in rows]

    with VllmTestServer(fresh(), max_model_len=512) as server:
        assert run_command(*flags_of(with_bytes, server, "straight"), "--policy.lora-rank", "2") == 0
        assert server.weight_version == "4"
        assert run_command(*flags_of(with_bytes, server, "whole")) == 0
        trained = load_file(with_bytes / "whole" / "model" / "model.safetensors")
        held = dict(server.model.named_parameters())
        assert all(torch.equal(held[name], trained[name]) for name in held)
    assert json.loads((with_bytes / "whole" / "summary.json").read_text())["status"] == "finished"
    capsys.readouterr()

    with VllmTestServer(fresh(), max_model_len=512) as server:
        finish = server.finish

        def breaks_after_two(body: Any) -> dict[str, Any]:
            if body == {"weight_version": "2"}:
                server.faults[COMPLETIONS] = [Fault(hang_up=True)] * 1000
            return finish(body)

        server.finish = breaks_after_two
        assert run_command(*flags_of(with_bytes, server, "cut")) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "a rollout failed 2 times" in said and "2 steps are kept" in said and "--resume" in said
        server.finish = finish
        server.faults.clear()
        assert run_command("--resume", with_bytes / "cut") == 0
    assert metrics("cut") == metrics("whole")


def test_a_run_on_the_cpu_says_that_weights_cannot_go_there(tmp_path, capsys) -> None:
    flags = ["--device", "cpu", "--engine.kind", "vllm", "--engine.url", "http://127.0.0.1:9"]
    assert run_command(*flags, "--output-dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "engine.kind = vllm" in error and "without a CUDA device" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_engine_errors_are_no_user_errors() -> None:
    assert not issubclass(EngineError, UserError)  # else nothing would be tried again
