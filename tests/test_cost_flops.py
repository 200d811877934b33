"""FLOPs in closed form against torch's counter on the same work."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig, linear_logprob
from tiny_models import byte_tokenizer, causal_model, config_of, reward_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from benchmarks.cost import flops
from benchmarks.cost.architecture import Architecture
from benchmarks.cost.counted import counted
from grpo_fast.attention import backends, paths
from grpo_fast.attention.function import use_packed_attention
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.errors import UserError
from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.policy import Policy
from grpo_fast.models.reward_data import Head
from grpo_fast.models.self_check import hidden_states
from grpo_fast.packing import PackedBatch, pack

BAR = 0.05
AS_IT_IS = backends.TABLE
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "vocab_size": 300,
}
PROMPTS = [9, 23, 14]
COMPLETIONS = [12, 5, 1, 30, 17, 8, 21, 21, 4]  # three a prompt
OWNER = [0, 0, 0, 1, 1, 1, 2, 2, 2]


def rows(
    lengths: list[int] = COMPLETIONS, *, share: bool = True, keep_last: bool = False, budget: int = 4096
) -> list[PackedBatch]:
    prompts = [[i + 1] * n for i, n in enumerate(PROMPTS)]
    completions = [[i + 5] * n for i, n in enumerate(lengths)]
    return pack(
        prompts, completions, prompt_of=OWNER, token_budget=budget, share_prefix=share, keep_last=keep_last
    )


def made(family: str, *, lora: bool = False, checkpointing: bool = False) -> tuple[Policy, Architecture]:
    settings = LoraSettings(rank=4) if lora else None
    policy = Policy.from_model(
        causal_model(family, **WIDE), byte_tokenizer(), lora=settings, gradient_checkpointing=checkpointing
    )
    found = Architecture.of(config_of(family, **WIDE), settings, checkpointing=checkpointing)
    return policy, replace(found, causal=False)


def grpo(policy: Policy, batches: list[PackedBatch]) -> None:
    for batch in batches:
        advantages = torch.linspace(-1, 1, len(batch.sequence_index)) + 0.01
        loss, _ = policy(batch, advantages, LossConfig.preset("grpo", kl_coef=0.0), normalizer=1.0)
        loss.backward()


def after_a_first_call(run: Any) -> int:
    run()
    return counted(run)


@pytest.fixture(autouse=True)
def one_segment_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Attention as torch's counter has it: SDPA on each segment, no padding between segments of several lengths."""
    monkeypatch.setattr(backends, "TABLE", (replace(backends.REFERENCE, run=paths.by_segment),))


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
@pytest.mark.parametrize("kind", ["full", "lora", "checkpointing", "lora checkpointing"])
def test_grpos_update(family: str, kind: str):
    policy, architecture = made(family, lora="lora" in kind, checkpointing="checkpointing" in kind)
    batches = rows(budget=70)
    assert len(batches) > 1
    measured = after_a_first_call(lambda: grpo(policy, batches))
    assert flops.training(architecture, batches) == pytest.approx(
        measured, rel=1e-6 if family != "gemma2" else BAR
    )


def test_the_step_as_it_runs(monkeypatch: pytest.MonkeyPatch):
    """Rollout, scores and update on a CPU with the attention chosen there, the padding of short rows among it."""
    monkeypatch.setattr(backends, "TABLE", AS_IT_IS)
    shape: dict[str, Any] = WIDE | {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6}
    policy = Policy.from_model(causal_model("qwen2", **shape), byte_tokenizer())
    reward = reward_model([Head(name="good")], **shape)
    engine = LocalEngine(policy.model)
    prompts = [[i + 1] * n for i, n in enumerate(PROMPTS)]
    lengths = [20] * 9
    scored, trained = rows(lengths, keep_last=True), rows(lengths)

    def step() -> None:
        engine.generate(prompts, 3, Sampling(max_new_tokens=20), 1)
        with torch.no_grad():
            for batch in scored:
                reward(batch)
        grpo(policy, trained)

    measured = after_a_first_call(step)
    policys = replace(Architecture.of(config_of("qwen2", **shape)), causal=False)
    rewards = replace(Architecture.of(config_of("qwen2", **shape), heads=1), causal=False)
    predicted = flops.generation(policys, PROMPTS, lengths, 3) + flops.scoring(rewards, scored)
    assert predicted + flops.training(policys, trained) == pytest.approx(measured, rel=BAR)


def test_shared_prompts_are_computed_once():
    policy, architecture = made("qwen2")
    shared, apart = (flops.training(architecture, rows(share=share)) for share in (True, False))
    batches = rows(share=False)
    assert apart == pytest.approx(after_a_first_call(lambda: grpo(policy, batches)), rel=1e-6)
    assert shared < 0.9 * apart


@pytest.mark.parametrize("lora", [False, True])
def test_looking_up_a_reference(lora: bool):
    policy, _ = made("qwen2", lora=lora)
    architecture = replace(Architecture.of(config_of("qwen2", **WIDE)), causal=False)  # the adapter is off
    batches = rows()

    def look_up() -> None:
        for batch in batches:
            policy.logprobs(batch, reference=lora)

    assert flops.logprobs(architecture, batches) == pytest.approx(after_a_first_call(look_up), rel=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_the_log_probs_that_dpo_trains(lora: bool):
    policy, architecture = made("llama", lora=lora)
    batches = rows()

    def pairs() -> None:
        for batch in batches:
            logprobs, _ = linear_logprob(policy.hidden_states(batch), targets=batch.targets, **policy._head())
            logprobs.sum().backward()

    measured = after_a_first_call(pairs)
    assert flops.training(architecture, batches, logprob_loss=True) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("group", [1, 3])
def test_generation(family: str, group: int):
    policy, architecture = made(family)
    engine = LocalEngine(policy.model, max_rows=4)
    prompts = [[i + 1] * n for i, n in enumerate(PROMPTS)]
    stops = tuple(range(0, 300, 7))  # completions end at lengths of their own
    found: list[Any] = []

    def generate() -> None:
        found[:] = engine.generate(prompts, group, Sampling(max_new_tokens=12, stop_token_ids=stops), 1)

    measured = after_a_first_call(generate)
    lengths = [len(completion.token_ids) for completion in found]
    assert len(set(lengths)) > 1
    predicted = flops.generation(architecture, PROMPTS, lengths, group)
    assert predicted == pytest.approx(measured, rel=BAR)
    with pytest.raises(ValueError, match="must have 3"):
        flops.generation(architecture, PROMPTS, lengths[:-1], group)


def test_a_reward_models_scores():
    names = [Head(name=name) for name in ("good", "safe")]
    model = reward_model(names, **WIDE)
    architecture = replace(Architecture.of(config_of("qwen2", **WIDE), heads=2), causal=False)
    batches = rows(keep_last=True)

    def score() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    assert flops.scoring(architecture, batches) == pytest.approx(after_a_first_call(score), rel=1e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_a_value_models_pass(backward: bool):
    config = config_of("qwen2", num_labels=1, **WIDE)
    model = use_packed_attention(AutoModelForSequenceClassification.from_config(config))
    score: Any = model.score
    assert isinstance(score, nn.Linear)
    batches = rows()
    architecture = replace(Architecture.of(config, heads=1), causal=False)

    def values() -> None:
        for batch in batches:
            states = hidden_states(model, batch, packed=True)[batch.hidden_index]
            found = score(states)
            if backward:
                found.square().sum().backward()

    predicted = flops.scoring(architecture, batches, backward=backward)
    assert predicted == pytest.approx(after_a_first_call(values), rel=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_only_visible_pairs_count_by_default(family: str, monkeypatch: pytest.MonkeyPatch):
    """Against an attention that lets each query meet the keys it sees and no others."""

    def one_query_at_a_time(q: Tensor, k: Tensor, v: Tensor, plan: PackedPlan, *, scale: float, **rest: Any):
        window, outs = rest["window"] or 1 << 30, []
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        layout = zip(plan.q_lens, plan.q_starts, plan.prefix_starts, plan.prefix_lens, strict=False)
        for own, start, first, shared in layout:
            for i in range(own):
                seen = [*range(first, first + shared), *range(start, start + i + 1)][-window:]
                keys, values = k[seen].transpose(0, 1), v[seen].transpose(0, 1)  # (H, seen, D)
                scores = torch.bmm(q[start + i, :, None], keys.mT) * scale
                outs.append(torch.bmm(scores.softmax(-1), values)[:, 0])
        return torch.stack(outs)

    monkeypatch.setattr(backends, "TABLE", (replace(backends.REFERENCE, run=one_query_at_a_time),))
    policy = Policy.from_model(causal_model(family, **WIDE), byte_tokenizer())
    architecture, batches = Architecture.of(config_of(family, **WIDE)), rows()
    measured = after_a_first_call(lambda: [policy.logprobs(batch) for batch in batches])
    assert flops.logprobs(architecture, batches) == measured


@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
def test_pairs_by_counting_them(window: int | None):
    for own, prefix in itertools.product((0, 1, 5, 12), (0, 3, 20)):
        seen = sum(min(prefix + i + 1, window or 1 << 30) for i in range(own))
        assert flops._visible(own, prefix, window) == seen


def test_an_adapter_saves_the_weights_gradients():
    full, lora = (Architecture.of(config_of("qwen2", **WIDE), x) for x in (None, LoraSettings(rank=4)))
    (batch,) = rows()
    assert flops.body_backward(full, batch) == pytest.approx(2 * flops.body_forward(full, batch), rel=0.1)
    assert flops.body_backward(lora, batch) < 0.65 * flops.body_backward(full, batch)
    assert flops.head(full, 10, "trained") == 1.5 * flops.head(lora, 10, "frozen") == 60 * 64 * 300


def test_what_cannot_be_counted_is_refused():
    from transformers import Qwen3MoeConfig

    experts = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_experts=4,
        moe_intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
    )
    with pytest.raises(UserError, match="experts"):
        Architecture.of(experts)
