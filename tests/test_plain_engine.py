"""The engine of models that cannot be packed: the trainer's numbers, one stream a completion, and a whole run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from grpo_kernels import LossConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.choose import builtin_engine
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.plain import PlainEngine
from grpo_fast.errors import UserError
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.policy import Policy
from grpo_fast.packing import pack
from grpo_fast.run.metrics import read_rows
from grpo_fast.train import main
from tests.families import ragged, tiny_model
from tests.tiny import write_prompts
from tests.tiny_models import HYBRIDS, SIZES, byte_tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
STOPS = tuple(range(0, 264, 9))
SAMPLING = Sampling(max_new_tokens=12, stop_token_ids=STOPS, temperature=0.7)


def hybrid(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | HYBRIDS[family]))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def alone(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """(N, V) log-probs of every token, from the model's own logits."""
    logits = model(input_ids=torch.tensor([prompt + completion[:-1]]), use_cache=False).logits[0]
    return (logits[len(prompt) - 1 :].float() / temperature).log_softmax(-1)


def own(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    table = alone(model, prompt, completion, temperature)
    return table.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("family", HYBRIDS)
def test_logprobs_are_the_trainers_and_streams_are_the_completions_own(family: str) -> None:
    model = hybrid(family)
    policy = Policy.from_model(copy.deepcopy(model), byte_tokenizer())
    engine = builtin_engine(policy, max_rows=4)
    assert isinstance(engine, PlainEngine)
    engine.push([], 7)
    groups: list[tuple[int, list[list[int]]]] = []
    found = engine.generate(
        PROMPTS, 5, SAMPLING, 3, on_group=lambda p, group: groups.append((p, tokens(group)))
    )
    assert groups == [(p, tokens(found[5 * p : 5 * p + 5])) for p in range(3)]
    assert policy.training
    for i, completion in enumerate(found):
        assert completion.version == 7 and len(completion.token_ids) <= 12
        assert not set(completion.token_ids[:-1]) & set(STOPS)
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in STOPS)
        want = own(model, PROMPTS[i // 5], completion.token_ids, 0.7)
        torch.testing.assert_close(completion.logprobs, want, atol=1e-5, rtol=1e-4)
    assert {c.finish_reason for c in found} == {"stop", "length"}
    assert len({tuple(ids) for ids in tokens(found)}) > 10
    # neither the rows beside it nor the prompts after it change a completion; its seed does
    few = PlainEngine(policy.model, max_rows=1).generate(PROMPTS[:2], 3, SAMPLING, 3)
    assert tokens(few) == tokens(found[:3] + found[5:8])
    assert tokens(engine.generate(PROMPTS, 5, SAMPLING, 4)) != tokens(found)


def test_it_draws_what_the_engine_of_packable_models_draws() -> None:
    for family in ("qwen2", "gemma2"):
        model, prompts = tiny_model(family), ragged()[0]
        for sampling in (Sampling(max_new_tokens=9), Sampling(max_new_tokens=9, top_p=0.8, top_k=20)):
            plain = PlainEngine(copy.deepcopy(model)).generate(prompts, 3, sampling, 1)
            ours = LocalEngine(copy.deepcopy(model)).generate(prompts, 3, sampling, 1)
            assert tokens(plain) == tokens(ours)
            for a, b in zip(plain, ours, strict=True):
                torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=1e-4)


def test_attention_sinks_are_decoded_by_transformers() -> None:
    model = tiny_model("gpt_oss")
    policy = Policy.from_model(copy.deepcopy(model), byte_tokenizer_of(97))
    engine = builtin_engine(policy, max_rows=4)
    assert policy.packed and isinstance(engine, PlainEngine)
    for i, completion in enumerate(engine.generate(PROMPTS, 2, Sampling(max_new_tokens=9), 0)):
        want = own(model, PROMPTS[i // 2], completion.token_ids, 1.0)
        torch.testing.assert_close(completion.logprobs, want, atol=1e-5, rtol=1e-4)


def byte_tokenizer_of(rows: int):
    """A tokenizer whose ids fit a model of few rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(rows)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")


def test_greedy_is_transformers_generate_and_truncation_renormalises() -> None:
    model = hybrid("lfm2").eval()
    engine = PlainEngine(copy.deepcopy(model))
    greedy = engine.generate(PROMPTS, 1, Sampling(max_new_tokens=8, temperature=0), 0)
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
        assert completion.token_ids == want[0, len(prompt) :].tolist()[: len(completion.token_ids)]
        torch.testing.assert_close(
            completion.logprobs, own(model, prompt, completion.token_ids, 1.0), atol=1e-5, rtol=1e-4
        )
    for i, completion in enumerate(engine.generate(PROMPTS, 4, Sampling(max_new_tokens=8, top_k=2), 0)):
        table = alone(model, PROMPTS[i // 4], completion.token_ids, 1.0)
        best = table.topk(2, dim=1)
        picked = best.indices == torch.tensor(completion.token_ids)[:, None]
        assert picked.any(1).all()
        want = best.values.log_softmax(1)[picked]
        torch.testing.assert_close(completion.logprobs, want, atol=1e-5, rtol=1e-4)


def test_bad_input() -> None:
    engine = PlainEngine(hybrid("lfm2"))
    with pytest.raises(UserError, match="prompt 1 is empty"):
        engine.generate([[1], []], 1, SAMPLING, 0)
    with pytest.raises(UserError, match="n, the completions per prompt"):
        engine.generate([[1]], 0, SAMPLING, 0)
    with pytest.raises(UserError, match="max_rows"):
        PlainEngine(engine.model, max_rows=0)
    with torch.no_grad():
        next(engine.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="prompt 0"):
        engine.generate([[1]], 1, SAMPLING, 0)


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
def test_the_steps_gradient_is_that_of_each_sequence_alone(family: str) -> None:
    """The GRPO loss with clipping and KL, written out over the model's own logits, whatever the token budget."""
    model = hybrid(family)
    policy = Policy.from_model(copy.deepcopy(model), byte_tokenizer())
    found = PlainEngine(policy.model).generate(PROMPTS, 2, SAMPLING, 0)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    config, owner = LossConfig.preset("grpo", kl_coef=0.1), [0, 0, 1, 1, 2, 2]
    shift = 0.3  # the old and the reference policy: as if they gave every token so much less, or more

    for i, completion in enumerate(found):
        now = own(model, PROMPTS[owner[i]], completion.token_ids, 0.7)
        ratio = (now - (now.detach() - shift)).exp()
        a = advantages[i]
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        gap = (now.detach() + shift) - now
        kl = gap.exp() - gap - 1
        ((-torch.minimum(ratio * a, clipped * a) + 0.1 * kl).mean() / len(found)).backward()

    for budget in (8, 1000):
        policy.model.zero_grad()
        batches = pack(PROMPTS, tokens(found), prompt_of=owner, token_budget=budget, share_prefix=False)
        for batch in batches:
            now, _ = policy.logprobs(batch, temperature=0.7)
            loss, _ = policy(
                batch,
                advantages[batch.sequence_index],
                config,
                old_logprobs=now - shift,
                ref_logprobs=now + shift,
                normalizer=float(len(found)),
                temperature=0.7,
            )
            loss.backward()
        for (name, p), q in zip(policy.model.named_parameters(), model.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=3e-6, rtol=1e-3, msg=lambda m, n=name: n + m)


def test_a_whole_run(tmp_path: Path) -> None:
    """Lfm2, convolutions beside attention: the reward goes up."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(
        "lfm2", **(sizes | HYBRIDS["lfm2"] | {"eos_token_id": tokenizer.eos_token_id})
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "one_letter.py").write_text(
        "def counts_e(prompts, completions, **columns):\n"
        "    return [text.count('e') / 16 for text in completions]\n"
    )
    flags = {
        "--policy.model": tmp_path / "policy",
        "--data.prompts": write_prompts(tmp_path / "p.jsonl", n=12),
        "--data.eval-size": 4,
        "--reward.functions": "one_letter:counts_e",
        "--rollout.prompts-per-step": 4,
        "--rollout.group-size": 8,
        "--rollout.max-new-tokens": 6,
        "--loss.kl-coef": 0.0,
        "--optim.lr": 6e-2,
        "--optim.warmup-steps": 0,
        "--run.steps": 8,
        "--run.eval-every": 0,
        "--output-dir": tmp_path,
        "--name": "hybrid",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.syspath_prepend(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main([str(part) for pair in flags.items() for part in pair])
    assert not stop.value.code
    steps = [row for row in read_rows(tmp_path / "hybrid" / "metrics.jsonl") if row["phase"] == "grpo"]
    rewards = [row["reward/counts_e"] for row in steps]
    assert len(rewards) == 8
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.02
    summary = json.loads((tmp_path / "hybrid" / "summary.json").read_text())
    assert summary["status"] == "finished"
