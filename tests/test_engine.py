"""The in-process engine: log-probs are the trainer's, choices the model's, random streams independent."""

from __future__ import annotations

import copy

import pytest
import torch

from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.sampling import draw, uniforms
from grpo_fast.errors import UserError
from tests.families import FAMILIES, VOCAB, packed_logprobs, ragged, tiny_model

PROMPTS = ragged(groups=5)[0]
STOPS = (3, 4, 5)


def texts(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_trainers(family: str, temperature: float) -> None:
    model = tiny_model(family)
    sampling = Sampling(temperature=temperature, max_new_tokens=30, stop_token_ids=STOPS)
    completions = LocalEngine(model, max_rows=7).generate(PROMPTS, 3, sampling, seed=1)
    owner = [p for p in range(len(PROMPTS)) for _ in range(3)]
    with torch.no_grad():
        want = packed_logprobs(
            model, PROMPTS, texts(completions), owner, token_budget=150, temperature=temperature
        )
    assert len({len(c.token_ids) for c in completions}) > 3
    for completion, expected in zip(completions, want, strict=True):
        assert completion.logprobs.dtype == torch.float32 and not completion.logprobs.requires_grad
        torch.testing.assert_close(completion.logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_generate(family: str) -> None:
    reference = tiny_model(family).eval()
    engine = LocalEngine(copy.deepcopy(reference), max_rows=3)
    completions = engine.generate(PROMPTS, 1, Sampling(temperature=0, max_new_tokens=25), seed=0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 25, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        want = reference.generate(ids, **options)[0, len(prompt) :].tolist()
        assert completion.token_ids == want
        assert completion.finish_reason == "length"


def test_a_completion_does_not_depend_on_its_company() -> None:
    model = tiny_model("qwen2")
    sampling = Sampling(max_new_tokens=40, stop_token_ids=STOPS)
    want = texts(LocalEngine(model).generate(PROMPTS, 4, sampling, seed=7))
    for rows, prefill in ((1, 1), (3, 9), (6, 10**6), (19, 16)):
        engine = LocalEngine(model, max_rows=rows, prefill_tokens=prefill)
        assert texts(engine.generate(PROMPTS, 4, sampling, seed=7)) == want
    fewer = texts(LocalEngine(model).generate(PROMPTS[:2], 3, sampling, seed=7))
    assert fewer == [want[p * 4 + s] for p in range(2) for s in range(3)]
    shorter = Sampling(max_new_tokens=5, stop_token_ids=STOPS)
    assert texts(LocalEngine(model).generate(PROMPTS, 4, shorter, seed=7)) == [w[:5] for w in want]
    assert texts(LocalEngine(model).generate(PROMPTS, 4, sampling, seed=8)) != want


def test_stopping_and_progress() -> None:
    engine = LocalEngine(tiny_model("qwen2"), max_rows=8)
    engine.push([], version=12)
    seen = []
    completions = engine.generate(
        PROMPTS,
        4,
        Sampling(max_new_tokens=16, stop_token_ids=STOPS),
        seed=0,
        on_progress=lambda done, total, tokens: seen.append((done, total, tokens)),
    )
    assert len(completions) == 4 * len(PROMPTS)
    for c in completions:
        assert c.version == 12 and len(c.logprobs) == len(c.token_ids)
        assert not any(t in STOPS for t in c.token_ids[:-1])
        assert (c.finish_reason == "stop") == (c.token_ids[-1] in STOPS)
        assert c.finish_reason == "stop" or len(c.token_ids) == 16
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert seen[-1] == (20, 20, sum(len(c.token_ids) for c in completions))


def test_ended_rows_cost_nothing() -> None:
    """The model sees each prompt token and each completion token but the last exactly once."""
    model = tiny_model("qwen2")
    engine = LocalEngine(model, max_rows=64)
    count = 0

    def counting(module, args, kwargs) -> None:
        nonlocal count
        count += kwargs["input_ids"].numel()

    model.base_model.register_forward_pre_hook(counting, with_kwargs=True)
    completions = engine.generate(PROMPTS, 4, Sampling(max_new_tokens=20, stop_token_ids=STOPS), seed=0)
    assert count == sum(map(len, PROMPTS)) + sum(len(c.token_ids) - 1 for c in completions)


def test_one_token_at_most() -> None:
    completions = LocalEngine(tiny_model("qwen2")).generate(PROMPTS, 2, Sampling(max_new_tokens=1), seed=0)
    assert [len(c.token_ids) for c in completions] == [1] * 10
    assert LocalEngine(tiny_model("qwen2")).generate([], 2, Sampling(), seed=0) == []


def test_training_goes_on_afterwards() -> None:
    """Modes come back module by module, gradient checkpointing and gradients still work."""
    model = tiny_model("qwen2")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.base_model.norm.eval()
    LocalEngine(model).generate(PROMPTS, 2, Sampling(max_new_tokens=5), seed=0)
    assert model.training and model.base_model.layers[0].training
    assert not model.base_model.norm.training
    torch.cat(packed_logprobs(model, *ragged(), token_budget=200)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_new_weights_are_used_at_once() -> None:
    model = tiny_model("qwen2")
    engine = LocalEngine(model)
    before = texts(engine.generate(PROMPTS, 1, Sampling(temperature=0), seed=0))
    with torch.no_grad():
        model.base_model.layers[1].mlp.up_proj.weight.mul_(-1)
    assert texts(engine.generate(PROMPTS, 1, Sampling(temperature=0), seed=0)) != before


def test_bad_input_and_bad_weights() -> None:
    model = tiny_model("qwen2")
    engine = LocalEngine(model)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        engine.generate([[1], []], 1, Sampling(), seed=0)
    with pytest.raises(UserError, match=f"token {VOCAB}, the vocabulary ends at {VOCAB - 1}"):
        engine.generate([[1, VOCAB]], 1, Sampling(), seed=0)
    with pytest.raises(UserError, match="n, the completions per prompt"):
        engine.generate([[1]], 0, Sampling(), seed=0)
    with pytest.raises(UserError, match="max_rows"):
        LocalEngine(model, max_rows=0)
    model.train()
    with torch.no_grad():
        model.base_model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="token 0 of prompt 0, sample 0"):
            engine.generate(PROMPTS, 2, Sampling(temperature=temperature), seed=0)
    assert model.training
    for bad in ({"temperature": -1}, {"max_new_tokens": 0}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Sampling(**bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("vocabulary", [3, 128, 300])
def test_draws_follow_the_distribution(vocabulary: int) -> None:
    """An even grid of uniform numbers must give each token its exact share."""
    count = 20_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    logits[1] = float("-inf")
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    p = (logits / 0.8).softmax(0)
    token, logprob = draw(logits.repeat(count, 1), grid, Sampling(temperature=0.8))
    share = torch.bincount(token, minlength=vocabulary) / count
    torch.testing.assert_close(share, p, atol=1.5 / count + 1e-6, rtol=0)
    torch.testing.assert_close(logprob.float(), p.log()[token], atol=1e-5, rtol=0)
    assert share[1] == 0


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}]
)
def test_truncated_draws(options: dict) -> None:
    """Only the tokens kept are drawn, and log-probs are those of the distribution they were drawn from."""
    count, vocabulary, temperature = 20_000, 200, 0.9
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    p = (logits / temperature).softmax(0)
    kept = torch.ones(vocabulary, dtype=torch.bool)
    order = p.argsort(descending=True)
    if "top_k" in options:
        kept[order[options["top_k"] :]] = False
    if "top_p" in options:
        inside = (p * kept) / (p * kept).sum()
        before = inside[order].cumsum(0) - inside[order]
        kept[order[before >= options["top_p"]]] = False
    if "min_p" in options:
        kept &= p >= options["min_p"] * p.max()
    q = (p * kept) / (p * kept).sum()
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token, logprob = draw(logits.repeat(count, 1), grid, Sampling(temperature=temperature, **options))
    share = torch.bincount(token, minlength=vocabulary) / count
    torch.testing.assert_close(share, q, atol=1.5 / count + 1e-6, rtol=0)
    torch.testing.assert_close(logprob.float(), q.log()[token], atol=1e-5, rtol=0)


def test_extreme_uniforms_stay_inside() -> None:
    logits = torch.full((2, 260), -60.0)
    logits[:, 7] = 0.0
    token, _ = draw(logits, torch.tensor([0.0, 1 - 2.0**-40], dtype=torch.float64), Sampling())
    assert token[0] in range(260) and token[1] in range(260)
    values = uniforms(seed=-1, prompt=2**31, sample=3, count=1000)
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.05
    assert (uniforms(0, 1, 2, 5) == uniforms(0, 1, 2, 9)[:5]).all()
    assert (uniforms(0, 1, 2, 5) != uniforms(0, 2, 1, 5)).all()
