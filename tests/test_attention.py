"""Packed attention equals one-sequence-at-a-time attention, forward and backward, in every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from grpo_fast.attention import paths
from grpo_fast.attention.function import ATTENTION_NAME, attention, use_packed_attention
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.errors import UserError
from grpo_fast.models.head import head_of
from tests.families import (
    FAMILIES,
    TINY,
    VOCAB,
    WITH_SINKS,
    packed_logprobs,
    ragged,
    single_logprobs,
    tiny_model,
)


def assert_same_gradients(
    model: torch.nn.Module, reference: torch.nn.Module, tolerance: float = 1e-5
) -> None:
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        scale = max(q.grad.abs().max().item(), 1.0)
        torch.testing.assert_close(
            p.grad, q.grad, atol=tolerance * scale, rtol=1e-4, msg=lambda m, n=name: n + m
        )


def weighted(logprobs: list[Tensor]) -> Tensor:
    """A scalar that gives every token a gradient of its own."""
    flat = torch.cat(logprobs)
    return (flat * torch.randn(len(flat), generator=torch.Generator().manual_seed(1))).sum()


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *WITH_SINKS])
def test_packed_equals_one_by_one(family: str, share_prefix: bool) -> None:
    reference = tiny_model(family)
    if (
        family == "gpt_oss"
    ):  # grouped products round by the batch's size, and a router close to a tie falls either way
        reference.set_experts_implementation("eager")
    model = use_packed_attention(copy.deepcopy(reference))
    data = ragged()
    want = single_logprobs(reference, *data)
    got = packed_logprobs(model, *data, token_budget=120, share_prefix=share_prefix)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)
    weighted(want).backward()
    weighted(got).backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    plain = use_packed_attention(tiny_model(family))
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        weighted(packed_logprobs(model.train(), *ragged(), token_budget=200)).backward()
    assert_same_gradients(checkpointed, plain, tolerance=1e-6)


def test_a_sequence_is_blind_to_the_others() -> None:
    model = use_packed_attention(tiny_model("qwen2"))
    prompts, completions, owner = ragged()
    before = packed_logprobs(model, prompts, completions, owner, token_budget=1000)
    completions[5] = [(t + 1) % VOCAB for t in completions[5]]
    after = packed_logprobs(model, prompts, completions, owner, token_budget=1000)
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != 5)


def test_small_chunks_and_recomputation_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for scores, saved in ((1 << 18, 1 << 24), (1, 0)):
        monkeypatch.setattr("grpo_fast.attention.plan.CHUNK_SCORES", {"cpu": scores, "cuda": 1})
        monkeypatch.setattr(paths, "SAVED_BYTES", saved)
        model = use_packed_attention(tiny_model("qwen2"))
        weighted(packed_logprobs(model, *ragged(), token_budget=200)).backward()
        results.append(model)
    assert_same_gradients(*results)


@pytest.mark.parametrize("family", [*FAMILIES, *WITH_SINKS])
def test_without_a_plan_it_is_ordinary_causal_attention(family: str) -> None:
    reference = tiny_model(family).eval()
    model: Any = use_packed_attention(copy.deepcopy(reference))
    ids = torch.randint(VOCAB, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-5)
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


def test_bfloat16_stays_as_close_as_transformers() -> None:
    exact = torch.cat(single_logprobs(tiny_model("qwen2"), *ragged()))
    reference = tiny_model("qwen2").bfloat16()
    model = use_packed_attention(copy.deepcopy(reference))
    theirs = (torch.cat(single_logprobs(reference, *ragged())) - exact).abs().mean()
    ours = (torch.cat(packed_logprobs(model, *ragged(), token_budget=150)) - exact).abs().mean()
    assert ours < 1.2 * theirs


def test_misuse_is_refused() -> None:
    model = use_packed_attention(tiny_model("qwen2"))
    ids = torch.ones(1, 6, dtype=torch.int64)
    plan = PackedPlan.of_lengths([6])
    with pytest.raises(UserError, match="use_cache=False"):
        model.base_model(input_ids=ids, plan=plan)
    with pytest.raises(UserError, match="padding mask"):
        model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"plan covers \(1, 7\)"):
        model.base_model(input_ids=ids, use_cache=False, plan=PackedPlan.of_lengths([7]))
    q = torch.zeros(1, 2, 6, 4)
    for options, message in (
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": q}, "position_bias"),
        ({"is_causal": False}, "causal"),
    ):
        with pytest.raises(UserError, match=message):
            attention(torch.nn.Module(), q, q, q, None, plan=plan, **options)  # pyright: ignore[reportArgumentType]


def test_models_that_would_leak_are_refused() -> None:
    hybrid = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    with pytest.raises(UserError, match="cannot be packed: it has layers of kind linear_attention"):
        use_packed_attention(
            AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_next", **TINY, **hybrid))
        )
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(UserError, match="MambaForCausalLM"):
        use_packed_attention(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **small)))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UserError, match="encoder-decoder"):
        use_packed_attention(t5)
    bloom = AutoConfig.for_model("bloom", vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(UserError, match="AttentionInterface"):
        use_packed_attention(AutoModelForCausalLM.from_config(bloom))


def test_preparing_twice_is_harmless() -> None:
    model = use_packed_attention(use_packed_attention(tiny_model("qwen2")))
    assert model.config._attn_implementation == ATTENTION_NAME
    assert len(model.base_model._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("gemma2", {}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("phi", {}),
    ],
)
def test_head_gives_the_models_logits(family: str, changes: dict) -> None:
    model = tiny_model(family, **changes).eval()
    bias = head_of(model).bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    ids = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(head_of(model).logits(hidden), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_head_with_lora_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen2")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)
    with pytest.raises(UserError, match="LoRA"):
        head_of(model)
