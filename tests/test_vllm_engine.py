"""Rollouts from a vLLM server, against a strict one of our own: log-probs, weights, contract, process."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.rules import FieldError
from grpo_fast.config.settings import TrainConfig
from grpo_fast.engines import choose, vllm, vllm_server
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.faults import EngineError
from grpo_fast.engines.guard import Guard
from grpo_fast.engines.vllm import VllmEngine
from grpo_fast.engines.vllm_answers import group_seed
from grpo_fast.engines.vllm_server import Serving, VllmServer, command
from grpo_fast.engines.vllm_weights import Parcel, chunks, pack_into, transfer_of
from grpo_fast.errors import UserError
from grpo_fast.models.lora import LoraSettings, add_lora, merged_parameters
from tests.families import VOCAB, packed_logprobs, ragged, tiny_model
from tests.vllm_server import BytesTransfer, Fault, VllmTestServer, engine_for

PROMPTS = ragged(groups=4)[0]
STOPS = (3, 4, 5)
SAMPLING = Sampling(max_new_tokens=12, stop_token_ids=STOPS)


def texts(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


def trained_copy(model: Any) -> Any:
    """The same architecture with other weights: what the policy is after some steps."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return other


def check_logprobs(policy: Any, completions: list, n: int, temperature: float = 1.0) -> None:
    from grpo_fast.attention.function import use_packed_attention

    owner = [prompt for prompt in range(len(PROMPTS)) for _ in range(n)]
    with torch.no_grad():
        want = packed_logprobs(
            use_packed_attention(copy.deepcopy(policy)),
            PROMPTS,
            texts(completions),
            owner,
            token_budget=200,
            temperature=temperature,
        )
    for completion, expected in zip(completions, want, strict=True):
        torch.testing.assert_close(completion.logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers_before_and_after_a_push(temperature: float) -> None:
    served = tiny_model("qwen2")
    policy = trained_copy(served)
    sampling = replace(SAMPLING, temperature=temperature)
    transfer = BytesTransfer()
    with VllmTestServer(copy.deepcopy(served)) as server:
        engine = engine_for(server, transfer=transfer)
        engine.push(served.named_parameters(), 0)
        first = engine.generate(PROMPTS, 3, sampling, seed=1)
        check_logprobs(served, first, 3, temperature)
        engine.push(policy.named_parameters(), 1)
        second = engine.generate(PROMPTS, 3, sampling, seed=1)
        check_logprobs(policy, second, 3, temperature)
        engine.close()
    assert texts(first) != texts(second)
    assert {c.version for c in first} == {0} and {c.version for c in second} == {1}
    assert {c.finish_reason for c in second} == {"stop", "length"}
    assert transfer.finished == 2 and len(transfer.chunks) > 8
    largest = max(p.nbytes for p in served.parameters())
    assert max(transfer.chunks) <= max(4096, largest)
    updates = [
        path.removeprefix("POST /") for path in server.paths if path.startswith("POST /") and "v1" not in path
    ]
    compact = [path for i, path in enumerate(updates) if i == 0 or updates[i - 1] != path]
    round_trip = ["pause", "start_weight_update", "update_weights", "finish_weight_update"]
    round_trip += ["reset_prefix_cache", "resume"]
    assert compact == ["init_weight_transfer_engine", *round_trip, *round_trip]


def test_the_prefix_cache_would_be_stale_without_a_reset() -> None:
    """The server's cache is real: where the reset is taken away, the first token's log-prob is the old weights'."""
    served = tiny_model("qwen2")
    with VllmTestServer(copy.deepcopy(served)) as server:
        engine = engine_for(server)
        engine.push(served.named_parameters(), 0)
        engine.generate(PROMPTS, 1, SAMPLING, seed=1)
        server.reset = lambda: {"success": True}  # pyright: ignore[reportAttributeAccessIssue]
        policy = trained_copy(served)
        engine.push(policy.named_parameters(), 1)
        completions = engine.generate(PROMPTS, 1, SAMPLING, seed=1)
        with pytest.raises(AssertionError):
            check_logprobs(policy, completions, 1)
        server.reset = lambda: {"success": False}  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(EngineError, match="keeps what it cached"):
            engine.push(policy.named_parameters(), 2)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}])
def test_truncated_sampling_reaches_the_server(options: dict) -> None:
    model = tiny_model("qwen2")
    with VllmTestServer(copy.deepcopy(model)) as server:
        engine = engine_for(server)
        engine.push(model.named_parameters(), 0)
        truncated = engine.generate(PROMPTS, 2, replace(SAMPLING, **options), seed=0)
        name, value = next(iter(options.items()))
        assert server.payloads[-1][name] == value
        greedy = engine.generate(PROMPTS, 2, replace(SAMPLING, temperature=0, **options), seed=0)
    with pytest.raises(AssertionError):  # log-probs are those of the truncated distribution
        check_logprobs(model, truncated, 2)
    check_logprobs(model, greedy, 2)
    assert texts(greedy)[::2] == texts(greedy)[1::2]


def test_a_completion_depends_on_seed_prompt_and_sample_alone() -> None:
    model = tiny_model("qwen2")
    with VllmTestServer(copy.deepcopy(model)) as server:
        engine = engine_for(server)
        engine.push(model.named_parameters(), 0)
        want = texts(engine.generate(PROMPTS, 4, SAMPLING, seed=7))
        fewer = texts(engine.generate(PROMPTS[:2], 3, SAMPLING, seed=7))
        assert fewer == [want[prompt * 4 + sample] for prompt in range(2) for sample in range(3)]
        assert texts(engine.generate(PROMPTS, 4, SAMPLING, seed=8)) != want
        narrow = engine_for(server, max_rows=1)
        narrow.push(model.named_parameters(), 0)
        assert texts(narrow.generate(PROMPTS, 4, SAMPLING, seed=7)) == want
    seeds = {group_seed(seed, prompt) for seed in range(-2, 40) for prompt in range(40)}
    assert len(seeds) == 42 * 40 and min(seeds) >= 0 and max(seeds) < 2**62


def test_groups_come_in_the_prompts_order_however_late_they_are() -> None:
    model = tiny_model("qwen2")
    with VllmTestServer(copy.deepcopy(model)) as server:
        engine = engine_for(server)
        engine.push(model.named_parameters(), 0)
        server.faults["/v1/completions"] = [Fault(delay_s=0.3)]
        seen: list[tuple[int, int]] = []
        engine.generate(
            PROMPTS, 2, SAMPLING, 0, on_group=lambda prompt, group: seen.append((prompt, len(group)))
        )
    assert seen == [(prompt, 2) for prompt in range(len(PROMPTS))]


def test_merged_weights_of_a_lora_policy_are_pushed_and_the_trained_ones_stay() -> None:
    base = tiny_model("qwen2")
    policy = copy.deepcopy(base)
    add_lora(policy, LoraSettings(rank=2, seed=1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    names = [name for name, _ in base.named_parameters()]
    assert [name for name, _ in merged_parameters(policy, policy.dtype)] == names
    with VllmTestServer(copy.deepcopy(base)) as server:
        engine = engine_for(server)
        engine.push(merged_parameters(policy, policy.dtype), 3)
        completions = engine.generate(PROMPTS, 2, SAMPLING, seed=0)
    check_logprobs(policy, completions, 2)
    with pytest.raises(AssertionError):
        check_logprobs(base, completions, 2)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_sleeping_between_rollouts() -> None:
    model = tiny_model("qwen2")
    with VllmTestServer(copy.deepcopy(model)) as server:
        engine = engine_for(server, sleep=True)
        for version in range(2):
            engine.push(model.named_parameters(), version)
            assert not server.asleep
            engine.generate(PROMPTS, 1, SAMPLING, seed=0)
            assert server.asleep
        engine.close()
        assert not server.asleep  # a server that was running is left as it was found


def test_servers_that_cannot_be_used_are_refused_by_name() -> None:
    model = tiny_model("qwen2")
    unusable: tuple[tuple[dict[str, Any], str], ...] = (
        ({"version": "0.29.1"}, "is vLLM 0.29.1, and its contract is known from 0.31 to 0.33"),
        ({"version": "0.34.0rc1"}, "0.34.0rc1"),
        ({"version": "unknown"}, "says its version is 'unknown'"),
        ({"processed": False}, "--logprobs-mode processed_logprobs"),
        ({"dev_mode": False}, "VLLM_SERVER_DEV_MODE=1"),
        ({"key": "sesame"}, "engine.api_key_env"),
    )
    for changes, message in unusable:
        with VllmTestServer(model, **changes) as server, pytest.raises(UserError, match=message) as refused:
            engine_for(server)
        assert "\n" not in str(refused.value) and "sesame" not in str(refused.value)
    with VllmTestServer(model, key="sesame", version="0.33.1.dev7+g12ab") as server:
        engine_for(server, key="sesame").close()
        engine = engine_for(server, key="sesame")
        with pytest.raises(UserError, match="prompt 0 is empty"):
            engine.generate([[]], 1, SAMPLING, 0)
        with pytest.raises(UserError, match="--max-model-len"):
            engine.generate([[1] * 120], 1, SAMPLING, 0)


def test_a_hand_over_that_fails_leaves_a_server_that_goes_on() -> None:
    model = tiny_model("qwen2")
    with VllmTestServer(copy.deepcopy(model)) as server:
        engine = engine_for(server)
        server.faults["/update_weights"] = [Fault(status=500)]
        with pytest.raises(EngineError, match="/update_weights: answered 500"):
            engine.push(model.named_parameters(), 1)
        assert not server.paused and not server.updating
        with pytest.raises(EngineError, match="holds weights 'default'"):
            engine.generate(PROMPTS, 1, SAMPLING, 0)
        with pytest.raises(EngineError, match="KeyError: another"):
            engine.push([("another", torch.zeros(2))], 1)
        engine.push(model.named_parameters(), 1)
        assert engine.generate(PROMPTS, 1, SAMPLING, 0)[0].version == 1


def test_our_side_of_a_collective_runs_beside_the_request(monkeypatch) -> None:
    """As NCCL needs it: both sides at once, an error of ours is seen, and one that hangs is not waited for."""
    model = tiny_model("qwen2")
    done: list[int] = []
    ours: list[Callable[[], None]] = [lambda: done.append(1)]

    class Collective(BytesTransfer):
        def parcel(self, chunk) -> Parcel:
            return Parcel(super().parcel(chunk).info, ours[0])

    def fails() -> None:
        raise EngineError("ncclBroadcast failed")

    with VllmTestServer(copy.deepcopy(model)) as server:
        transfer = Collective()
        engine = engine_for(server, transfer=transfer)
        engine.push(model.named_parameters(), 1)
        assert len(done) == len(transfer.chunks) > 1
        ours[0] = fails
        with pytest.raises(EngineError, match="ncclBroadcast failed"):
            engine.push(model.named_parameters(), 2)
        monkeypatch.setattr(vllm, "JOIN_S", 0.1)
        ours[0] = lambda: time.sleep(30)
        with pytest.raises(EngineError, match=r"our side of it hangs for 0\.1 s"):
            engine.push(model.named_parameters(), 2)
        assert not server.paused and not server.updating


def test_chunks_hold_what_they_may_and_everything() -> None:
    named = [(str(i), torch.full((size,), float(i))) for i, size in enumerate((3, 5, 40, 1, 1))]
    named += [("half", torch.ones(3, dtype=torch.bfloat16)), ("last", torch.arange(4.0).view(2, 2).T)]
    cut = list(chunks(named, 40))
    assert [[name for name, _ in chunk] for chunk in cut] == [
        ["0", "1"],
        ["2"],
        ["3", "4"],
        ["half"],
        ["last"],
    ]
    buffer = torch.zeros(16, dtype=torch.uint8)
    assert pack_into(buffer, cut[-1]) == [16]
    assert buffer.view(torch.float32).tolist() == [0.0, 2.0, 1.0, 3.0]


# ---- the process ----


def program(folder: Path, body: str) -> str:
    """An executable file."""
    path = folder / "vllm"
    path.write_text(body)
    path.chmod(0o755)
    return str(path)


def serving(model: Path) -> Serving:
    return Serving(
        model=str(model),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        seed=3,
        transfer="bytes",
        devices="",
    )


def started(settings: EngineSettings, model: Path, log: Path) -> VllmEngine:
    return VllmEngine(settings, BytesTransfer(), server=VllmServer(settings, serving(model), log))


def processes() -> dict[int, int]:
    """The process group of everything that runs; what has ended and waits to be collected does not."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX":
                found[int(path.parent.name)] = int(process_group)
    return found


def is_alive(pid: int) -> bool:
    return pid in processes()


def group(leader: int) -> list[int]:
    return [pid for pid, process_group in processes().items() if process_group == leader]


@pytest.mark.slow
def test_a_server_is_started_restarted_and_stopped(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "model")
    root = Path(__file__).parents[1]
    words = f'PYTHONPATH="{root}:{root}/kernels" exec {sys.executable} -m tests.vllm_server "$@"'
    script = f"#!/bin/sh\ncd {root} && {words}\n"
    settings = EngineSettings(
        kind="vllm",
        executable=program(tmp_path, script),
        options=("max-logprobs=3",),
        timeout_s=20,
        start_timeout_s=120,
        sleep=True,
    )
    engine = started(settings, tmp_path / "model", tmp_path / "run" / "vllm.log")
    server = engine._server
    assert server is not None and server._process is not None
    first = second = server._process.pid
    guarded = Guard(engine, vocabulary=VOCAB, retries=1, weights=model.named_parameters)
    try:
        guarded.push(model.named_parameters(), 4)
        want = texts(guarded.generate(PROMPTS, 2, SAMPLING, seed=0))
        os.killpg(first, signal.SIGKILL)
        assert texts(guarded.generate(PROMPTS, 2, SAMPLING, seed=0)) == want
        assert guarded.counts() == {"engine/retries": 1.0}
        second = server._process.pid
    finally:
        guarded.close()
    assert second != first and not group(first) and not group(second)
    assert server.key not in (tmp_path / "run" / "vllm.log").read_text()


def test_a_server_that_does_not_come_up_is_explained_and_gone(tmp_path: Path, monkeypatch) -> None:
    dies = program(tmp_path, "#!/bin/sh\necho loading\necho 'ValueError: no such model' >&2\nexit 3\n")
    settings = EngineSettings(kind="vllm", executable=dies, start_timeout_s=20)
    with pytest.raises(EngineError, match=r"exit code 3 .*ValueError: no such model") as error:
        started(settings, tmp_path, tmp_path / "vllm.log")
    assert "\n" not in str(error.value)

    monkeypatch.setattr(vllm_server, "STOP_S", 0.3)
    children = tmp_path / "pids"
    deaf = program(
        tmp_path,
        f"#!/bin/sh\ntrap '' TERM\nsleep 300 & echo $! >> {children}\necho $$ >> {children}\necho still loading\n"
        "while true; do sleep 1; done\n",
    )
    settings = EngineSettings(kind="vllm", executable=deaf, start_timeout_s=1)
    with pytest.raises(EngineError, match=r"start_timeout_s = 1 s; .*still loading"):
        started(settings, tmp_path, tmp_path / "vllm.log")
    pids = [int(word) for word in children.read_text().split()]
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_a_server_does_not_outlive_a_killed_trainer(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    deaf = program(tmp_path, f"#!/bin/sh\necho $$ >> {pids}\nwhile true; do sleep 1; done\n")
    trainer = (
        "import sys; from pathlib import Path\n"
        "from grpo_fast.config.engine_settings import EngineSettings\n"
        "from grpo_fast.engines.vllm_server import Serving, VllmServer\n"
        f"settings = EngineSettings(kind='vllm', executable={deaf!r}, start_timeout_s=60)\n"
        f"VllmServer(settings, {serving(tmp_path)!r}, Path({str(tmp_path / 'vllm.log')!r})).start()\n"
    )
    with subprocess.Popen([sys.executable, "-c", trainer], cwd=Path(__file__).parents[1]) as process:
        wait_for(lambda: pids.exists() and pids.read_text().strip() != "")
        pid = int(pids.read_text())
        assert is_alive(pid)
        process.kill()
    wait_for(lambda: not is_alive(pid))


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_command_line_of_a_server() -> None:
    settings = EngineSettings(
        kind="vllm", executable="vllm", options=("enforce-eager", "tensor-parallel-size=2"), sleep=True
    )
    words = command("/opt/vllm", settings, serving(Path("model")), 81)
    assert words[:3] == ["/opt/vllm", "serve", "model"] and words[-4:] == [
        "--enable-sleep-mode",
        "--enforce-eager",
        "--tensor-parallel-size",
        "2",
    ]
    pairs = dict(zip(words[3::2], words[4::2], strict=False))
    assert pairs["--host"] == "127.0.0.1" and pairs["--logprobs-mode"] == "processed_logprobs"
    assert pairs["--weight-transfer-config"] == '{"backend": "bytes"}' and pairs["--seed"] == "3"
    assert pairs["--max-model-len"] == "128" and pairs["--generation-config"] == "vllm"


# ---- settings ----


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ({"kind": "local", "url": "http://127.0.0.1:1"}, "url", "needs engine.kind = vllm"),
        ({"kind": "local", "devices": "1"}, "devices", "needs engine.kind = vllm"),
        ({"cuda_graphs": "off", "executable": "vllm"}, "cuda_graphs", "needs engine.kind = local"),
        ({"kind": "vllm"}, "kind", "needs engine.url or engine.executable"),
        (
            {"url": "http://127.0.0.1:1", "executable": "vllm"},
            "url",
            "cannot be given with engine.executable",
        ),
        ({"url": "http://10.0.0.7:8000"}, "url", "engine.allow_remote = true"),
        ({"url": "http://gpu-box:8000"}, "url", "engine.allow_remote = true"),
        ({"url": "http://gpu-box:8000", "allow_remote": True, "transfer": "ipc"}, "transfer", "use nccl"),
        ({"url": "http://127.0.0.1:1/v1"}, "url", "the server's root, without /v1"),
        ({"url": "http://user:secret@127.0.0.1:1"}, "url", "engine.api_key_env"),
        ({"url": "http://127.0.0.1:port"}, "url", "must be as http://127.0.0.1:8000"),
        ({"url": "127.0.0.1:8000"}, "url", "must be as http://127.0.0.1:8000"),
        ({"url": "http://127.0.0.1:1", "devices": "1"}, "devices", "needs engine.executable"),
        ({"executable": "vllm", "allow_remote": True}, "allow_remote", "needs engine.url"),
        ({"executable": "vllm", "devices": "one"}, "devices", "numbers of GPUs"),
        ({"executable": "vllm", "devices": "1", "sleep": True}, "sleep", "engine.devices"),
        ({"executable": "vllm", "options": ("host=0.0.0.0",)}, "options", "must not set host"),
        ({"executable": "vllm", "options": ("API_KEY=x",)}, "options", "must not set api-key"),
        ({"executable": "vllm", "options": ("--x",)}, "options", "without dashes"),
        ({"executable": "vllm", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization", "must be in"),
    ],
)
def test_settings_that_cannot_be(given: dict, field: str, message: str) -> None:
    with pytest.raises(FieldError, match=message) as refused:
        TrainConfig(engine=EngineSettings(**{"kind": "vllm", **given}))
    assert refused.value.field == f"engine.{field}" and "secret" not in str(refused.value)


def test_settings_that_can_be() -> None:
    possible: tuple[dict[str, Any], ...] = (
        {"url": "http://localhost:8000/"},
        {"url": "https://[::1]:8000"},
        {"url": "http://10.0.0.7:8000", "allow_remote": True, "api_key_env": "KEY"},
        {"executable": "vllm", "options": ("enforce-eager", "quantization=fp8"), "devices": "1,2"},
    )
    for given in possible:
        TrainConfig(engine=EngineSettings(kind="vllm", **given))


def test_where_weights_can_go() -> None:
    gpu = torch.device("cuda:0")
    here = EngineSettings(kind="vllm", executable="vllm")
    assert transfer_of(here, gpu).name == "ipc"
    assert transfer_of(replace(here, devices="1"), gpu).name == "nccl"
    away = EngineSettings(kind="vllm", url="http://10.0.0.7:1", allow_remote=True)
    assert transfer_of(away, gpu).name == "nccl"
    with pytest.raises(UserError, match=r"2 workers.*nccl"):
        transfer_of(here, gpu).greeting(2)
    with pytest.raises(UserError, match="cannot be handed over to a vLLM server without a CUDA device"):
        transfer_of(here, torch.device("cpu"))


def test_what_is_checked_before_a_model_is_loaded(tmp_path: Path, monkeypatch) -> None:
    def check(**given: Any) -> None:
        choose.check_engine(TrainConfig(device="cpu", engine=EngineSettings(kind="vllm", **given)))

    with pytest.raises(UserError, match="without a CUDA device, and the run is on cpu"):
        check(url="http://127.0.0.1:9")
    monkeypatch.setattr(
        "grpo_fast.engines.vllm_weights.transfer_of", lambda settings, device: BytesTransfer()
    )
    with pytest.raises(UserError, match=r"nowhere/vllm is not there.*bin/vllm"):
        check(executable="/nowhere/vllm")
    (tmp_path / "vllm").write_text("")
    with pytest.raises(UserError, match=r"cannot be run"):
        check(executable=str(tmp_path / "vllm"))
    with pytest.raises(UserError, match=r"no connection .*is it up"):
        check(url="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"engine.api_key_env = NOT_THERE must name"):
        check(url="http://127.0.0.1:9", api_key_env="NOT_THERE")
    with (
        VllmTestServer(tiny_model("qwen2"), version="0.20.0") as server,
        pytest.raises(UserError, match=r"0.20.0"),
    ):
        check(url=server.url)


# ---- a real server ----


@pytest.mark.skipif(
    not os.environ.get("GRPO_FAST_VLLM_URL"),
    reason="no real vLLM: GRPO_FAST_VLLM_URL must be the address of one that serves the model GRPO_FAST_VLLM_MODEL",
)
def test_the_contract_of_a_real_server() -> None:
    """Handshake, hand-over and log-probs. Needs one GPU that both share, and a model of vocabulary VOCAB or larger."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        os.environ["GRPO_FAST_VLLM_MODEL"], dtype=torch.bfloat16
    )
    model = loaded.cuda()
    settings = EngineSettings(kind="vllm", url=os.environ["GRPO_FAST_VLLM_URL"])
    engine = VllmEngine(settings, transfer_of(settings, model.device))
    sampling = Sampling(max_new_tokens=16, temperature=0.8)
    gaps = []
    for version, scale in enumerate((1.0, 1.02)):
        with torch.no_grad():
            model.base_model.layers[0].mlp.up_proj.weight.mul_(scale)
        engine.push(model.named_parameters(), version)
        completions = engine.generate(PROMPTS, 2, sampling, seed=0)
        assert {c.version for c in completions} == {version}
        for index, completion in enumerate(completions):
            prompt = PROMPTS[index // 2]
            ids = torch.tensor([prompt + completion.token_ids], device=model.device)
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / 0.8
            own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
            gaps.append((own - completion.logprobs).abs().mean())
    assert max(prompt for group in PROMPTS for prompt in group) < VOCAB
    assert torch.stack(gaps).mean() < 0.05  # bfloat16 in two implementations
    engine.close()
