"""What the planner counts against what real tensors take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig
from tiny_models import byte_tokenizer, causal_model, config_of, reward_model
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config

from grpo_fast.attention.group_cache import GroupCache
from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.memory.attention import row_plan
from grpo_fast.memory.estimate import Planner, Work, rough_bytes
from grpo_fast.memory.passes import (
    completion_positions,
    count_parameters,
    meta_policy,
    scoring_bytes,
    update_bytes,
)
from grpo_fast.memory.scratch import cache_bytes, head_scratch
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.models.reward_data import Head
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.packing import PackedBatch, pack

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
PROMPT, NEW, GROUP = 40, 33, 6
SEVEN_B = Qwen2Config(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


def packed_batch(*, keep_last: bool = False) -> PackedBatch:
    completions = [[i + 1] * NEW for i in range(2 * GROUP)]
    owner = [i // GROUP for i in range(2 * GROUP)]
    (batch,) = pack(
        [[1] * PROMPT, [2] * PROMPT], completions, prompt_of=owner, token_budget=4096, keep_last=keep_last
    )
    return batch


def planned_row() -> Any:
    return row_plan(2 * (PROMPT + GROUP * (NEW - 1)), PROMPT, NEW - 1, GROUP)


def held_and_peak(run: Any) -> tuple[int, int]:
    """Bytes that PyTorch allocated during `run` and holds after it, and the most it held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        run()
    events: list[Any] = recorded.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    now = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return now, peak


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_parameters_are_counted_exactly(family: str):
    model = causal_model(family)
    counts = count_parameters(meta_policy(config_of(family)))
    assert counts.total == counts.trained == sum(p.numel() for p in model.parameters())
    policy = Policy.from_model(model, byte_tokenizer(), lora=LoraSettings(rank=4))
    counts = count_parameters(meta_policy(config_of(family), lora=LoraSettings(rank=4)))
    assert counts.trained == counts.adapter == sum(p.numel() for p in policy.trainable_parameters())
    assert counts.total + counts.adapter == sum(p.numel() for p in policy.parameters())
    named = LoraSettings(rank=4, target_modules=("q_proj",))
    assert count_parameters(meta_policy(config_of(family), lora=named)).adapter < counts.adapter


def test_the_planned_row_is_the_packed_one():
    batch, plan = packed_batch(), planned_row()
    assert sorted(plan.q_lens) == sorted(batch.plan.q_lens)
    assert sorted(plan.prefix_lens) == sorted(batch.plan.prefix_lens)
    assert completion_positions(plan) == len(batch.targets)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("kind", ["full", "lora", "checkpointing"])
def test_kept_activations_are_those_a_forward_pass_leaves(family: str, kind: str):
    lora = LoraSettings(rank=4) if kind == "lora" else None
    options: dict[str, Any] = {"lora": lora, "gradient_checkpointing": kind == "checkpointing"}
    policy = Policy.from_model(causal_model(family, **WIDE), byte_tokenizer(), **options)
    batch = packed_batch()
    states: list[torch.Tensor] = []
    measured, _ = held_and_peak(lambda: states.append(policy.hidden_states(batch)))
    assert states[0].requires_grad
    model = meta_policy(config_of(family, **WIDE), **options)
    found = update_bytes(model, planned_row(), "cpu", micro_batches=1).kept
    assert found == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("kind", ["full", "lora", "checkpointing"])
def test_the_peak_of_forward_and_backward_is_the_real_one(kind: str):
    shape: dict[str, Any] = WIDE | {"vocab_size": 2048}
    lora = LoraSettings(rank=4) if kind == "lora" else None
    options: dict[str, Any] = {"lora": lora, "gradient_checkpointing": kind == "checkpointing"}
    policy = Policy.from_model(causal_model(**shape), byte_tokenizer(), **options)
    batch = packed_batch()
    advantages = torch.ones(len(batch.sequence_index))
    loss = LossConfig.preset("grpo", kl_coef=0.0)
    _, measured = held_and_peak(lambda: policy(batch, advantages, loss, normalizer=1.0)[0].backward())
    found = update_bytes(
        meta_policy(config_of("qwen2", **shape), **options), planned_row(), "cpu", micro_batches=1
    )
    scratch = head_scratch(len(batch.targets), 2048, 64, torch.float32, device="cpu", trained=kind != "lora")
    assert max(found.at_head + scratch, found.peak) == pytest.approx(measured, rel=0.08)


def test_the_second_micro_batch_meets_the_gradients_of_the_first():
    model = meta_policy(config_of("qwen2", **WIDE))
    one, two = (update_bytes(model, planned_row(), "cpu", micro_batches=n) for n in (1, 2))
    assert one.gradients == two.gradients == 4 * count_parameters(model).trained
    assert one.kept == two.kept and one.at_head < two.at_head
    assert two.at_head - one.at_head == pytest.approx(one.gradients, rel=0.01)


def test_narrow_gradients_are_summed_in_float32():
    model = meta_policy(config_of("qwen2", **WIDE), dtype=torch.bfloat16)
    found = update_bytes(model, planned_row(), "cpu", micro_batches=2)
    assert found.gradients == 4 * count_parameters(model).trained


def test_scoring_is_what_the_reward_model_takes():
    model = reward_model([Head(name="a")], **WIDE).eval()
    batch = packed_batch(keep_last=True)
    with torch.no_grad():
        _, measured = held_and_peak(lambda: model.read_with_features(batch))
    plan = row_plan(2 * (PROMPT + GROUP * NEW), PROMPT, NEW, GROUP)
    weights, found = scoring_bytes(config_of("qwen2", **WIDE), plan, "cpu", torch.float32)
    outputs = 64 * 4  # a configuration has two by default, this model has one
    assert weights == sum(p.nbytes for p in model.model.parameters()) + outputs
    assert found == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("rows", [6, 8])
@pytest.mark.parametrize(("prompt", "new"), [(10, 20), (40, 150)])
def test_the_cache_is_the_engines(prompt: int, new: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    held: list[int] = []
    begin = GroupCache.begin

    def remembered(self: GroupCache, *args: Any) -> None:
        begin(self, *args)
        held.append(self.nbytes)

    monkeypatch.setattr(GroupCache, "begin", remembered)
    engine = LocalEngine(causal_model(), max_rows=rows)
    engine.generate([[1] * prompt, [2] * prompt], 4, Sampling(max_new_tokens=new), 0)
    shape = {"rows": rows, "each": 4, "waiting": rows < 8, "prompt": prompt, "new": new}
    first, last = cache_bytes(config_of("qwen2"), torch.float32, device="cpu", **shape)
    if rows == 8:
        layer = (held[-1] - first) // 2 // 2  # while a layer's keys move, both exist
        assert last == max(held) + layer
    else:
        assert max(held) <= last <= 2.5 * max(held)


@pytest.mark.parametrize("fp8", [False, True])
def test_pages_are_the_engines(fp8: bool):
    engine = LocalEngine(causal_model(), max_rows=6, settings=EngineSettings(kv_dtype="fp8"))
    if not fp8:
        engine.settings, engine._paged = EngineSettings(), True
    engine.generate([[1] * 70, [2] * 70], 4, Sampling(max_new_tokens=30), 0)
    shape = {"rows": 6, "each": 4, "waiting": True, "prompt": 70, "new": 30, "fp8": fp8}
    assert cache_bytes(config_of("qwen2"), torch.float32, device="cuda", **shape)[1] == engine.memory()


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_the_optimizers_state_is_counted(kind: Any):
    model = causal_model()
    optimizer = Optimizer(model.parameters(), lr=1e-3, kind=kind)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    state = optimizer.inner.state_dict()["state"].values()
    held = sum(x.nbytes for entry in state for x in entry.values() if torch.is_tensor(x) and x.numel() > 1)
    found = Planner(small_work(factored=kind == "adafactor")).estimate().optimizer
    assert found == pytest.approx(held, rel=0.01)


def test_the_heads_scratch_is_that_of_the_gpu_backend():
    sizes = pytest.importorskip("grpo_kernels._triton_head", reason="needs triton")._sizes
    for tokens in (100, 8192, 65_536):
        for vocabulary in (32_000, 152_064):
            part, rows = sizes(tokens, vocabulary, 2, True)
            real = rows * vocabulary * 2 + part * vocabulary * 4 + 2 * rows * 896 * 4
            found = head_scratch(tokens, vocabulary, 896, torch.bfloat16, device="cuda", trained=False)
            assert found == pytest.approx(real, rel=0.2)


def small_work(**changes: Any) -> Work:
    shape: dict[str, Any] = {"prompts": 4, "prompt_tokens": 16, "new_tokens": 16, "token_budget": 512}
    shape["policy"] = config_of("qwen2")
    return Work(**(shape | changes))


def test_seven_billion_parameters():
    gpu: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "reward_dtype": torch.bfloat16}
    shape: dict[str, Any] = {
        "token_budget": 8192,
        "gradient_checkpointing": True,
        "prompt_tokens": 512,
        "prompts": 1,
    }
    planner = Planner(Work(policy=SEVEN_B, **gpu, **shape, max_rows=64))
    full = planner.estimate(reference=True)
    parameters = 7_615_616_512
    assert full.parameters == full.reference == 2 * parameters
    assert full.optimizer == 12 * parameters and full.gradients == 4 * parameters
    assert full.runtime == full.heap == 0
    eight_bit = planner.estimate(reference=True, state_bytes=2.0)
    assert full.peak - eight_bit.peak == 6 * parameters
    on_host = planner.estimate(optimizer_on_host=True)
    assert (
        on_host.optimizer == 0 and on_host.gradients == 2 * 2 * 152_064 * 3584
    )  # two of the largest on their way
    assert planner.estimate(activations_on_host=True).activations < full.activations
    lora = Planner(
        Work(policy=SEVEN_B, **gpu, **shape, max_rows=64, lora=LoraSettings(rank=16), reference=True)
    )
    adapter = lora.estimate()
    assert adapter.reference == 0 and adapter.optimizer < 1e9 < adapter.parameters
    assert adapter.peak < 2**30 * 32 < 2**30 * 128 < full.peak
    four_bit = lora.estimate(frozen_bytes=0.5)
    linear = parameters - 2 * 152_064 * 3584
    assert adapter.parameters - four_bit.parameters == pytest.approx(1.5 * linear, rel=0.001)


def test_two_reward_models_cost_two():
    one, two = (Planner(small_work(reward_models=(config_of("qwen2"),) * n)).estimate() for n in (1, 2))
    assert two.reward_models == 2 * one.reward_models and two.scoring == one.scoring > 0
    assert one.score > 0 == Planner(small_work()).estimate().score


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=8)])
def test_the_rough_bound_is_above_the_estimate(family: str, lora: LoraSettings | None):
    config = config_of(family, max_position_embeddings=1024, **WIDE | {"num_hidden_layers": 2})
    models: dict[str, Any] = {"lora": lora, "reference": True, "reward_models": (config,)}
    for shape in ({"new_tokens": 16, "token_budget": 1024}, {"new_tokens": 150, "prompts": 1}):
        work = small_work(**models | {"policy": config, "reward_tokens": 512, "prefill_tokens": 64} | shape)
        assert rough_bytes(work) > Planner(work).estimate().peak


def test_processes_share_weights_gradients_and_states_out():
    config = config_of("llama")
    model = count_parameters(meta_policy(config))
    alone, four, each = (
        Planner(Work(policy=config, device="cuda", ranks=ranks, reduced_each=reduced)).estimate()
        for ranks, reduced in ((1, False), (4, False), (4, True))
    )
    assert four.optimizer == alone.optimizer // 4 == 8 * model.trained // 4
    assert four.parameters == 4 * model.total // 4 + 4 * model.total  # a share, and the engine's copy
    assert four.gradients == alone.gradients == 4 * model.trained
    assert each.gradients < alone.gradients and each.update < four.update
