"""A LoRA adapter on a base model in 4 bits: trained, merged, saved. Needs the extra `lowbit`."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.errors import UserError
from grpo_fast.grpo import update
from grpo_fast.models.head import head_of
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.packing import pack
from tests.test_grpo import config, rollout
from tests.tiny import save_policy

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the optional extra lowbit")
IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def saved(request, tmp_path_factory):
    """A tied and an untied head; layers of several blocks of 64."""
    folder = tmp_path_factory.mktemp("quantized") / request.param
    return save_policy(folder, request.param, hidden_size=128, intermediate_size=256)


def load(path, dtype: str = "float32", **options) -> Policy:
    policy = Policy.load(path, dtype=dtype, lora=LoraSettings(rank=4), quantize="nf4", **options)
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zero at first: nothing could be told from the base
            parameter.data.normal_(0, 0.05)
    return policy


def test_linear_layers_are_in_4_bits_and_the_ends_are_not(saved):
    policy = load(saved, "bfloat16")
    policy.self_check()
    plain = AutoModelForCausalLM.from_pretrained(saved)
    layer: Any = policy.model.get_submodule("model.layers.0.mlp.up_proj.base_layer")
    assert isinstance(layer, bitsandbytes.nn.Linear4bit) and layer.weight.numel() == 128 * 256 // 2
    assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested  # double quantisation
    assert head_of(policy.model).weight.dtype == torch.bfloat16
    ends: list[Any] = [policy.model.get_input_embeddings(), plain.get_input_embeddings()]
    assert torch.equal(ends[0].weight, ends[1].weight.bfloat16())
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.bfloat16}
    assert all("lora" in name for name, p in policy.model.named_parameters() if p.requires_grad)


def test_only_the_adapter_learns_and_the_reference_is_the_base(saved):
    policy = load(saved, gradient_checkpointing=True)
    before = copy.deepcopy(policy.model.state_dict())
    optimizer = Optimizer(policy.trainable_parameters(), lr=1e-2)
    with torch.no_grad(), policy.adapter_off():
        base = policy.model(IDS).logits
    for _ in range(2):
        metrics = update(policy, optimizer, rollout(), config("grpo"), lr=1e-2)
    assert metrics["kl"] > 1e-4
    changed = {n for n, v in policy.model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed and all("lora_" in name for name in changed)
    with torch.no_grad(), policy.adapter_off():
        assert torch.equal(policy.model(IDS).logits, base)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_the_merged_model_is_a_plain_one_with_the_same_logits(saved, tmp_path, dtype, limit):
    policy = load(saved, dtype)
    with torch.no_grad():
        wanted = policy.model(IDS).logits
        with policy.adapter_off():
            assert (policy.model(IDS).logits - wanted).abs().max() > 10 * limit
    in_memory = copy.deepcopy(policy.model.state_dict())
    policy.save(tmp_path / "merged", merge=True)
    assert all(torch.equal(v, in_memory[n]) for n, v in policy.model.state_dict().items())
    assert (
        policy.model.hf_quantizer is not None
        and "quantization" not in (tmp_path / "merged/config.json").read_text()
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    merged, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {policy.model.dtype}
    assert merged.dtype == policy.model.dtype and type(merged.lm_head) is torch.nn.Linear
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in merged.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=0, atol=limit)
    Policy.load(tmp_path / "merged").self_check()


def test_merging_dequantises_layers_without_an_adapter_too(saved, tmp_path):
    lora = LoraSettings(rank=4, target_modules=("q_proj",))
    policy = Policy.load(saved, lora=lora, quantize="nf4")
    policy.save(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, policy.model(IDS).logits, rtol=0, atol=1e-5)


def test_a_saved_adapter_goes_on_over_a_base_in_4_bits(saved, tmp_path):
    policy = load(saved)
    policy.save(tmp_path / "adapter")
    again = Policy.load(tmp_path / "adapter", quantize="nf4")
    with torch.no_grad():
        torch.testing.assert_close(again.model(IDS).logits, policy.model(IDS).logits, rtol=0, atol=1e-6)
    assert len(again.trainable_parameters()) == len(policy.trainable_parameters())


def test_training_goes_on_after_generating(saved):
    policy = load(saved)
    (prompt,) = [IDS[0].tolist()]
    engine, sampling = LocalEngine(policy.model), Sampling(max_new_tokens=8, stop_token_ids=())
    before = engine.generate([prompt], 4, sampling, seed=0)
    optimizer = Optimizer(policy.trainable_parameters(), lr=1e-2)
    metrics = update(policy, optimizer, rollout(), config("dapo"), lr=1e-2)
    assert metrics["grad_norm"] > 0
    after = engine.generate([prompt], 4, sampling, seed=0)
    assert any(not torch.equal(a.logprobs, b.logprobs) for a, b in zip(before, after, strict=True))
    (batch,) = pack([prompt], [c.token_ids for c in after], prompt_of=[0] * 4, token_budget=4096)
    torch.testing.assert_close(
        policy.logprobs(batch)[0], batch.gather([c.logprobs for c in after]), rtol=0, atol=1e-4
    )


def test_4_bits_alone_cannot_be_trained(saved):
    with pytest.raises(UserError, match="train an adapter"):
        Policy.load(saved, quantize="nf4")
