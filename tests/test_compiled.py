"""Compiled decoder layers: the same numbers, no graph for a new length or plan, and what is refused.

Dynamo's tracing is what is tested, so most cases let it run the traced graphs as they are; one compiles to C++.
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.config import resolve
from grpo_fast.config.resolve import compiles, resolve_device
from grpo_fast.config.rules import FieldError
from grpo_fast.config.settings import PolicySettings, TrainConfig
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.errors import UserError
from grpo_fast.models import compiled as module
from grpo_fast.models.compiled import CompiledLayers, check_compiled
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.packing import PackedBatch, pack
from tests.tiny_models import byte_tokenizer, causal_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def policies(monkeypatch, family: str, backend: str = "eager", **options) -> tuple[Policy, Policy]:
    """The same policy plain and compiled."""
    monkeypatch.setattr(CompiledLayers.__init__, "__defaults__", (backend,))
    plain = Policy.from_model(causal_model(family), byte_tokenizer(), **options)
    return plain, Policy.from_model(causal_model(family), byte_tokenizer(), compiled=True, **options)


def batch(seed: int = 0, completions: int = 5) -> PackedBatch:
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(
            5, 250, (int(torch.randint(low, high, (), generator=draw)),), generator=draw
        ).tolist()

    owner = [i % 2 for i in range(completions)]
    (packed,) = pack(
        [ids(3, 9), ids(3, 9)], [ids(2, 12) for _ in owner], prompt_of=sorted(owner), token_budget=4096
    )
    return packed


def loss_and_gradients(policy: Policy, packed: PackedBatch) -> list[Tensor]:
    policy.zero_grad()
    loss = policy.sft_loss(packed, len(packed.targets))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in policy.trainable_parameters() if p.grad is not None)]


def assert_same(plain: Policy, compiled: Policy, packed: PackedBatch) -> None:
    pairs = zip(loss_and_gradients(compiled, packed), loss_and_gradients(plain, packed), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "backend"), [("qwen2", "inductor"), ("gemma2", "eager")])
def test_compiled_code_gives_the_plain_numbers_at_every_length(monkeypatch, family, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++")
    plain, compiled = policies(monkeypatch, family, backend)
    layers = compiled.compiled
    assert layers is not None and layers.graphs >= 4 and layers.seconds > 0
    graphs = layers.graphs
    for seed, completions in ((0, 5), (1, 9), (2, 3)):
        assert_same(plain, compiled, batch(seed, completions))
    assert layers.graphs <= graphs + 1  # the first layer's input has no gradient of its own in some families
    assert not layers.off


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LoraSettings(rank=2, target_modules=("q_proj", "up_proj")), "gradient_checkpointing": True},
    ],
    ids=["full", "lora"],
)
def test_new_lengths_and_updates_add_no_graphs(monkeypatch, options):
    plain, compiled = policies(monkeypatch, "llama", **options)
    layers = compiled.compiled
    assert layers is not None
    assert_same(plain, compiled, batch())
    compiled.logprobs(batch())
    graphs = layers.graphs
    start = plain.logprobs(batch(1), reference=True)[0] if options else None
    for seed in range(1, 4):
        for policy in (plain, compiled):
            with torch.no_grad():
                for parameter in policy.trainable_parameters():
                    parameter += 0.01  # in place, as the optimizer does
        assert_same(plain, compiled, batch(seed, 3 + seed))
        ours, theirs = compiled.logprobs(batch(seed))[0], plain.logprobs(batch(seed))[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert layers.graphs == graphs and layers.metrics()["compile/graphs"] == graphs
    if start is not None:
        torch.testing.assert_close(
            compiled.logprobs(batch(1), reference=True)[0], start, atol=1e-5, rtol=1e-5
        )
        assert (compiled.logprobs(batch(1))[0] - start).abs().max() > 1e-3
        graphs = layers.graphs  # the adapter switched off is a variant of its own
    assert [line for line in layers.news() if f"{graphs} graphs" in line] and layers.news() == []


def test_references_are_the_weights_they_should_be(monkeypatch):
    _, compiled = policies(monkeypatch, "qwen2")
    frozen, twin = compiled.frozen_copy(), copy.deepcopy(compiled)
    before = compiled.logprobs(batch())[0]
    with torch.no_grad():
        for parameter in compiled.trainable_parameters():
            parameter.mul_(1.1)
    assert (compiled.logprobs(batch())[0] - before).abs().max() > 1e-3
    for reference in (frozen, twin):
        torch.testing.assert_close(reference.logprobs(batch())[0], before, atol=1e-6, rtol=1e-6)
    assert frozen.compiled is compiled.compiled


def test_generation_runs_the_plain_layers(monkeypatch):
    plain, compiled = policies(monkeypatch, "qwen2")
    layers = compiled.compiled
    assert layers is not None
    graphs, sampling = layers.graphs, Sampling(max_new_tokens=6, stop_token_ids=(257,))
    found, expected = (
        LocalEngine(policy.model).generate([[5, 6, 7], [8, 9]], 2, sampling, 0)
        for policy in (compiled, plain)
    )
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert layers.graphs == graphs


def test_a_storm_of_graphs_ends_compilation_aloud(monkeypatch):
    plain, compiled = policies(monkeypatch, "qwen2", gradient_checkpointing=True)
    layers = compiled.compiled
    assert layers is not None
    layers.news()
    layers.limit = layers.graphs - 1
    assert_same(plain, compiled, batch())
    graphs = layers.graphs
    (line,) = layers.news()
    assert "switched off" in line and f"{graphs} graphs" in line and layers.off
    compiled.logprobs(batch())  # would be a new graph: no gradients
    assert layers.graphs == graphs


def test_numbers_that_differ_and_compilers_that_fail_are_refused(monkeypatch):
    policy = Policy.from_model(causal_model("qwen2"), byte_tokenizer())

    def wrong(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return lambda *args: tuple(x * 1.01 if isinstance(x, Tensor) else x for x in graph(*args))

    def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no such instruction")

    for backend, match in (
        (wrong, r"Qwen2ForCausalLM differ .* in a"),
        (failing, "fails on Qwen2ForCausalLM.*no such"),
    ):
        torch.compiler.reset()
        monkeypatch.setattr(module, "lookup_backend", lambda _, backend=backend: backend)
        layers = CompiledLayers()
        layers.install(policy.model)
        with pytest.raises(UserError, match=match) as caught:
            check_compiled(policy.model, layers)
        assert "\n" not in str(caught.value)


def test_settings(monkeypatch):
    def config(choice: Any, **policy) -> TrainConfig:
        return TrainConfig(device="cpu", policy=PolicySettings(compile=choice, **policy))

    cpu = torch.device("cpu")
    assert not compiles(config("off"), cpu) and not compiles(config("auto"), cpu)
    with pytest.raises(FieldError, match=r"policy.compile cannot be on with policy.liger"):
        config("on", liger=True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "g++-15" else None)
    monkeypatch.setattr(resolve, "_COMPILE_PAYS", {"cpu"})
    for named, there in (("g++-15 -m64", True), ("my-c++", False)):
        monkeypatch.setenv("CXX", named)
        assert compiles(config("on"), cpu) and compiles(config("auto"), cpu) == there
        resolve_device(config("auto"))
        if there:
            resolve_device(config("on"))
        else:
            with pytest.raises(
                FieldError, match=r"policy.compile needs a compiler, and there is no my-c\+\+"
            ):
                resolve_device(config("on"))
