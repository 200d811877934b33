"""The policy: packed log-probs and gradients against the plain model, LoRA, saving, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from grpo_kernels import LossConfig
from peft import PeftModel
from tiny_models import END, HYBRIDS, SIZES, byte_tokenizer, causal_model, config_of
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    NemotronConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
)

from grpo_fast.errors import UserError
from grpo_fast.models import pretrained, self_check
from grpo_fast.models.head import head_of
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.packing import PackedBatch, pack

FAMILIES = ("qwen2", "llama", "gemma2")
PROMPTS = [[5, 9, 200, 31, 7, 7, 90], [88, 14, 3]]
COMPLETIONS = [[11, 12, 13, 14, 257], [60, 61], [4, 99, 257], [150] * 9, [70]]
PROMPT_OF = [0, 0, 1, 1, 0]
TOKENS = sum(map(len, COMPLETIONS))


def policy_of(family: str = "qwen2", *, seed: int = 0, **options) -> Policy:
    return Policy.from_model(causal_model(family, seed=seed), byte_tokenizer(), **options)


def one_batch(*, share_prefix: bool = True) -> PackedBatch:
    (batch,) = pack(PROMPTS, COMPLETIONS, prompt_of=PROMPT_OF, token_budget=4096, share_prefix=share_prefix)
    return batch


def plain_logprobs(model: PreTrainedModel | PeftModel, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs of each completion alone, from the model's own logits."""
    found = []
    for completion, owner in zip(COMPLETIONS, PROMPT_OF, strict=True):
        ids = torch.tensor([PROMPTS[owner] + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(completion) - 1 : -1].float()
        logprobs = (logits / temperature).log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def jolt(policy: Policy, seed: int = 1) -> None:
    """Move every trainable parameter, so that adapters (which start at zero) matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def save_plain(folder: Path, family: str = "qwen2", **overrides) -> Path:
    causal_model(family, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share_prefix", [True, False])
def test_packed_logprobs_equal_the_models_own(family: str, share_prefix: bool):
    plain = causal_model(family)
    policy = policy_of(family)
    policy.self_check()
    batch = one_batch(share_prefix=share_prefix)
    logprobs, entropy = policy.logprobs(batch)
    assert logprobs.dtype == entropy.dtype == torch.float32 and not logprobs.requires_grad
    torch.testing.assert_close(logprobs, batch.gather(plain_logprobs(plain)), atol=2e-5, rtol=1e-5)
    warm, _ = policy.logprobs(batch, temperature=0.7)
    torch.testing.assert_close(warm, batch.gather(plain_logprobs(plain, 0.7)), atol=4e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_plain_loss(family: str):
    """Tied heads (qwen2, gemma2): what the head adds must reach the embedding's gradient."""
    plain = causal_model(family)
    (-torch.cat(plain_logprobs(plain)).sum() / TOKENS).backward()
    policy = policy_of(family)
    policy.sft_loss(one_batch(), TOKENS).backward()
    tied = head_of(plain).weight is next(plain.parameters())
    assert tied == (family != "llama")
    for (name, expected), found in zip(plain.named_parameters(), policy.model.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, atol=2e-6, rtol=1e-4, msg=name)


def test_the_split_into_micro_batches_does_not_change_the_gradient():
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3])
    gradients, losses = [], []
    for budget in (4096, 16, 4):
        policy, total = policy_of(), 0.0
        batches = pack(PROMPTS, COMPLETIONS, prompt_of=PROMPT_OF, token_budget=budget)
        assert (len(batches) > 1) == (budget < 4096)
        for batch in batches:
            old, _ = policy.logprobs(batch)
            loss, metrics = policy(
                batch,
                advantages[batch.sequence_index],
                LossConfig.preset("grpo"),
                old_logprobs=old - 0.1,
                ref_logprobs=old + 0.2,
                normalizer=float(len(COMPLETIONS)),
            )
            loss.backward()
            total += loss.item()
            assert all(value.ndim == 0 for value in metrics.values())
        losses.append(total)
        gradients.append(
            torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
        )
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=2e-6, rtol=1e-4)


def test_an_update_along_the_gradient_raises_the_favoured_tokens():
    policy, batch = policy_of(), one_batch()
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])[batch.sequence_index]
    before, _ = policy.logprobs(batch)
    loss, _ = policy(batch, advantages, LossConfig.preset("grpo", kl_coef=0.0))
    loss.backward()
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter -= 0.05 * cast(Tensor, parameter.grad)
    change = policy.logprobs(batch)[0] - before
    bounds = batch.cu_seqlens.tolist()
    of = {int(i): change[bounds[k] : bounds[k + 1]].sum() for k, i in enumerate(batch.sequence_index)}
    assert of[0] > 0 > of[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradient(family: str):
    def gradient(**options) -> Tensor:
        policy = policy_of(family, **options)
        policy.sft_loss(one_batch(), TOKENS).backward()
        return torch.cat([p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(gradient_checkpointing=True), gradient(), atol=1e-7, rtol=1e-5)
    lora = LoraSettings(rank=2)
    with_both = gradient(gradient_checkpointing=True, lora=lora)
    assert with_both.abs().max() > 0
    assert with_both.shape == gradient(lora=lora).shape


def test_save_and_load_a_full_model(tmp_path: Path):
    policy = policy_of("gemma2")
    jolt(policy)
    policy.save(tmp_path / "m")
    batch = one_batch()
    expected, _ = policy.logprobs(batch)
    again = Policy.load(tmp_path / "m")
    assert torch.equal(again.logprobs(batch)[0], expected)
    assert again.stop_token_ids == (257,)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(batch.gather(plain_logprobs(plain)), expected, atol=2e-5, rtol=1e-5)
    assert "grpo_fast" not in (tmp_path / "m" / "config.json").read_text()


def test_bfloat16(tmp_path: Path):
    save_plain(tmp_path)
    policy = Policy.load(tmp_path, dtype="bfloat16", lora=LoraSettings(rank=2))
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    policy.self_check()
    batch = one_batch()
    assert policy.logprobs(batch)[0].dtype == torch.float32
    exact = batch.gather(plain_logprobs(causal_model()))
    assert (policy.logprobs(batch)[0] - exact).abs().mean() < 0.05
    policy.sft_loss(batch, TOKENS).backward()


def test_frozen_copy_stays_where_it_was():
    policy, batch = policy_of(), one_batch()
    reference = policy.frozen_copy()
    before, _ = policy.logprobs(batch)
    jolt(policy)
    assert torch.equal(reference.logprobs(batch)[0], before)
    assert not torch.equal(policy.logprobs(batch)[0], before)
    assert reference.trainable_parameters() == []
    with pytest.raises(ValueError, match="frozen_copy"):
        policy.logprobs(batch, reference=True)


def test_dropout_is_off():
    """As a layer (llama's adapters) and as a number (OPT): two passes in training mode are equal."""
    config = OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5)
    policy = Policy.from_model(AutoModelForCausalLM.from_config(config), byte_tokenizer())
    assert policy.training and policy.model.training
    assert torch.equal(policy.logprobs(one_batch())[0], policy.logprobs(one_batch())[0])
    policy.self_check()
    lora = policy_of(lora=LoraSettings(rank=2))
    assert all(m.p == 0 for m in lora.modules() if isinstance(m, torch.nn.Dropout))


# LoRA


def test_lora_trains_adapters_only_and_remembers_the_reference():
    policy, batch = policy_of("llama", lora=LoraSettings(rank=3, alpha=6)), one_batch()
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names) and not any("lm_head" in name for name in names)
    start, _ = policy.logprobs(batch)
    torch.testing.assert_close(
        start, batch.gather(plain_logprobs(causal_model("llama"))), atol=2e-5, rtol=1e-5
    )
    jolt(policy)
    policy.self_check()
    torch.testing.assert_close(policy.logprobs(batch, reference=True)[0], start, atol=0, rtol=0)
    assert (policy.logprobs(batch)[0] - start).abs().max() > 1e-3
    assert [name for name, p in policy.model.named_parameters() if p.requires_grad] == names
    with pytest.raises(ValueError, match="reference=True"):
        policy.frozen_copy()


def test_lora_on_named_modules():
    policy = policy_of(lora=LoraSettings(rank=2, target_modules=("q_proj", "v_proj")))
    assert len(policy.trainable_parameters()) == 2 * 2 * 2


def test_saved_adapter_loads_in_peft_and_merged_weights_in_transformers(tmp_path: Path):
    save_plain(tmp_path / "base")
    policy = Policy.load(tmp_path / "base", lora=LoraSettings(rank=3))
    jolt(policy)
    batch = one_batch()
    expected, _ = policy.logprobs(batch)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    policy.save(tmp_path / "adapter")
    policy.save(tmp_path / "merged", merge=True)
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    close: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(batch.gather(plain_logprobs(peft)), expected, **close)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    merged, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(batch.gather(plain_logprobs(merged)), expected, **close)
    again = Policy.load(tmp_path / "adapter")
    assert again.is_lora and len(again.trainable_parameters()) == len(policy.trainable_parameters())
    torch.testing.assert_close(again.logprobs(batch)[0], expected, **close)
    with pytest.raises(UserError, match="adapter already"):
        Policy.load(tmp_path / "adapter", lora=LoraSettings())


@pytest.mark.parametrize(
    ("family", "targets", "named"),
    [
        ("llama", ("q_proj", "lm_head"), "lm_head is the head of LlamaForCausalLM"),
        ("qwen2", r".*(q_proj|lm_head)", "lm_head is the head of Qwen2ForCausalLM"),
        ("qwen2", ("embed_tokens",), "model.embed_tokens is the embedding"),
        ("qwen2", ("query",), "target_modules"),
    ],
)
def test_lora_where_it_cannot_be(family: str, targets, named: str):
    with pytest.raises(UserError, match=named) as caught:
        policy_of(family, lora=LoraSettings(rank=2, target_modules=targets))
    assert "\n" not in str(caught.value)


# Self-check and refusals


def one_by_one(model: PreTrainedModel, policy: Policy) -> None:
    """Log-probs, and the gradient of a loss, as of each sequence alone under the model's own eager forward."""
    for share_prefix in (True, False):
        batch = one_batch(share_prefix=share_prefix)
        expected = plain_logprobs(model)
        torch.testing.assert_close(policy.logprobs(batch)[0], batch.gather(expected), atol=2e-5, rtol=1e-5)
        model.zero_grad()
        policy.model.zero_grad()
        (-torch.cat(expected).sum() / TOKENS).backward()
        policy.sft_loss(batch, TOKENS).backward()
        for (name, p), q in zip(policy.model.named_parameters(), model.parameters(), strict=True):
            if q.grad is None or p.grad is None:
                assert q.grad is p.grad, name
            else:
                torch.testing.assert_close(p.grad, q.grad, atol=5e-6, rtol=1e-4, msg=name)


def test_self_check_sees_a_leak(caplog: pytest.LogCaptureFixture):
    self_check._say.cache_clear()
    policy = policy_of()
    policy.model.set_attn_implementation("sdpa")  # ignores the plan: packed sequences see each other
    assert policy.packed
    policy.self_check()
    policy.self_check()
    assert not policy.packed and not policy.frozen_copy().packed
    assert len(caplog.messages) == 1
    assert "Qwen2ForCausalLM runs one sequence a row: hidden states of packed sequences" in caplog.text
    one_by_one(causal_model("qwen2"), policy)


def test_self_check_sees_an_architecture_that_drops_the_plan(caplog: pytest.LogCaptureFixture):
    self_check._say.cache_clear()
    model = AutoModelForCausalLM.from_config(NemotronConfig(**SIZES))
    policy = Policy.from_model(copy.deepcopy(model), byte_tokenizer())
    policy.self_check()
    assert "NemotronForCausalLM runs one sequence a row: hidden states of packed" in caplog.text
    one_by_one(model, policy)


def test_a_model_that_looks_ahead_is_refused(monkeypatch: pytest.MonkeyPatch):
    policy = policy_of()
    policy.packed = False
    policy.model.set_attn_implementation("sdpa")
    plain = torch.nn.functional.scaled_dot_product_attention

    def blind_to_order(*args, **options):
        return plain(*args, **(options | {"is_causal": False, "attn_mask": None}))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", blind_to_order)
    with pytest.raises(UserError, match=r"change by .* with tokens that come later"):
        policy.self_check()


def test_self_check_sees_a_head_of_another_form(monkeypatch: pytest.MonkeyPatch):
    policy = policy_of()
    plain = type(policy.model).forward

    def doubled(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(policy.model), "forward", doubled)
    with pytest.raises(UserError, match="differs from the model's logits by 50"):
        policy.self_check()


def refused(path, match: str, **options) -> None:
    with pytest.raises(UserError, match=match) as caught:
        Policy.load(path, **options)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_model(tmp_path: Path):
    refused(tmp_path / "absent", "no such folder")
    refused("./absent", "no such folder")
    refused(tmp_path, "no config.json or adapter_config.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "cannot read its configuration")


def test_broken_checkpoints(tmp_path: Path):
    weights = save_plain(tmp_path, "llama") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "cannot read its weights")
    weights.unlink()
    refused(tmp_path, "cannot read its weights")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(tmp_path, "weights are not in its files .first: model.layers.2")


def test_a_reward_model_is_no_policy(tmp_path: Path):
    AutoModelForSequenceClassification.from_config(config_of("qwen2", num_labels=2)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, "Qwen2ForSequenceClassification")


def test_tokenizers_that_do_not_fit(tmp_path: Path):
    save_plain(tmp_path, vocab_size=100, pad_token_id=0, eos_token_id=1)
    refused(tmp_path, "ids up to 257, the model's embedding has 100 rows")
    save_plain(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").unlink()
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    refused(tmp_path / "b", "does not bring text back|cannot read its tokenizer")


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("lfm2", "Lfm2ForCausalLM runs one sequence a row: it has layers of kind conv"),
        (
            "qwen3_next",
            "Qwen3NextForCausalLM runs one sequence a row: it has layers of kind linear_attention",
        ),
        ("mamba", "MambaForCausalLM runs one sequence a row: it "),
        ("bloom", "BloomForCausalLM runs one sequence a row: it does not take its attention from"),
    ],
)
def test_architectures_that_cannot_be_packed_run_one_by_one(
    tmp_path: Path, family: str, why: str, caplog: pytest.LogCaptureFixture
):
    self_check._say.cache_clear()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(SIZES | HYBRIDS[family])), attn_implementation="eager"
    )
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    policy.self_check()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("grpo_fast")]
    assert not policy.packed and len(said) == 1 and said[0].startswith(why)
    one_by_one(model, policy)


def test_a_hybrid_with_convolutions_beside_its_attention():
    """Falcon-H1's layer kinds do not show it: its modules do."""
    config = AutoConfig.for_model(
        "falcon_h1", **SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    )
    policy = Policy.from_model(AutoModelForCausalLM.from_config(config), byte_tokenizer())
    assert not policy.packed


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (T5Config(vocab_size=300, d_model=16, num_layers=1), "model type t5 has no AutoModelForCausalLM"),
        (
            Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]}),
            r"Qwen2ForCausalLM has three-dimensional positions \(mRoPE\)",
        ),
    ],
)
def test_architectures_that_are_refused(tmp_path: Path, config, match: str):
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, match)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": YARN,
    "longrope": LONGROPE,
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_scaling(kind: str):
    """Fixed scalings are packed at any length; the two that look at the row's longest, up to their first length."""
    overrides: dict[str, Any] = {"rope_parameters": {"rope_theta": 10000.0, **SCALINGS[kind]}}
    plain, policy = (causal_model("llama", **overrides) for _ in range(2))
    policy = Policy.from_model(policy, byte_tokenizer())
    policy.self_check()
    assert policy.packed
    one_by_one(plain, policy)
    limit, why = pretrained.position_limit(policy.model.config) or (0, "")
    assert limit == (24 if kind == "longrope" else 256)
    assert (kind in why) == (kind == "longrope")


def test_sequences_on_both_sides_of_a_switch_are_refused():
    policy = Policy.from_model(
        causal_model("llama", rope_parameters={"rope_theta": 1e4, **LONGROPE}), byte_tokenizer()
    )
    batch = pack([[1, 2, 3]], [[4] * 30, [5] * 4], prompt_of=[0, 0], token_budget=99)[0]
    with pytest.raises(UserError, match=r"32 positions, more than .*24 .*longrope"):
        policy.logprobs(batch)


def test_dtype_and_device(tmp_path: Path):
    save_plain(tmp_path)
    refused(tmp_path, "dtype must be float32 or bfloat16, got float16", dtype="float16")
    refused(tmp_path, "device", device="gpu")
    refused(tmp_path, "CUDA devices", device="cuda:99")


def test_a_tokenizer_of_whole_words_passes_the_round_trip():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"red": 0, "green": 1, "blue": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pretrained.check_round_trip(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), "it")
    words.pre_tokenizer = pre_tokenizers.Split("e", "removed")
    with pytest.raises(UserError, match="does not bring text back"):
        pretrained.check_round_trip(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), "it")


def test_stop_tokens_come_from_both_places():
    policy = Policy.from_model(causal_model(), byte_tokenizer(pad=END))
    policy.model.generation_config.eos_token_id = [12, 257]
    assert policy.stop_token_ids == (12, 257)
