"""The policy: packed log-probs and gradients against the plain model, LoRA, saving, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from grpo_kernels import LossConfig
from peft import PeftModel
from tiny_models import END, SIZES, byte_tokenizer, causal_model, config_of
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MambaConfig,
    NemotronConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    T5Config,
)

from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
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


def test_self_check_sees_a_leak():
    policy = policy_of()
    policy.model.set_attn_implementation("sdpa")  # ignores the plan: packed sequences see each other
    with pytest.raises(UserError, match="leak between sequences"):
        policy.self_check()


def test_self_check_sees_an_architecture_that_drops_the_plan():
    policy = Policy.from_model(AutoModelForCausalLM.from_config(NemotronConfig(**SIZES)), byte_tokenizer())
    with pytest.raises(UserError, match="NemotronForCausalLM: hidden states of packed sequences differ"):
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
    ("config", "match"),
    [
        (T5Config(vocab_size=300, d_model=16, num_layers=1), "model type t5 has no AutoModelForCausalLM"),
        (MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1), "MambaForCausalLM"),
        (Qwen3NextConfig(vocab_size=300, hidden_size=16, num_hidden_layers=4), "Qwen3NextForCausalLM"),
    ],
)
def test_architectures_that_cannot_be_packed(tmp_path: Path, config, match: str):
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, match)


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
