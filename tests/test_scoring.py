"""Several reward models as one, prompts that are too long, and the scoring of a batch in whatever order it comes."""

from __future__ import annotations

import random
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import END, PAD, byte_tokenizer, reward_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from grpo_fast.config.settings import RewardSettings
from grpo_fast.data.prompts import Prompt
from grpo_fast.errors import UserError
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_set import RewardSet, read_saved
from grpo_fast.rewards.functions import RewardFunctions
from grpo_fast.scoring import Scored, Scorer, Scoring

NAN = float("nan")
SAFETY, TONE = Head(name="safety", mean=0.5, std=0.25), Head(name="tone", mean=2.0, std=1.5)
KIND = Head(name="kind", kind="binary")
TEXTS = ["How do I wash a cup?", "hi", "How do I wash a cup?", "Tell me a story, please.", "hi"]
REPLIES = ["First, get water.", "hello there", "", "Once upon a time there was a very small fox.", "no"]


def reversed_tokenizer() -> PreTrainedTokenizerBase:
    """The same bytes under other ids."""
    vocab = {text: 255 - i if i < 256 else i for text, i in byte_tokenizer().get_vocab().items()}
    return Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=PAD, pad_token=PAD, eos_token=END)


# Several models


def test_an_ensemble_of_checkpoints_by_the_law_of_total_variance():
    layout = Layout(heads=(SAFETY, KIND), members=2, gaussian=True)
    first, second = reward_model(layout, seed=1), reward_model(layout, seed=2)
    other = reward_model([TONE], "llama", seed=3, tokenizer=reversed_tokenizer())
    models = RewardSet.of([first, other, second])
    assert [len(ensemble) for ensemble in models.ensembles] == [2, 1]
    assert models.names == ["safety", "kind", "tone"] and models.heads == [SAFETY, KIND, TONE]
    assert models.with_spread == ["safety", "kind"]
    found = models.predict(TEXTS, REPLIES, 64)
    alone = [m.predict(m.encode(TEXTS, REPLIES)) for m in (first, second)]
    torch.testing.assert_close(
        found.scores[:, :2], (alone[0].scores + alone[1].scores) / 2, atol=1e-5, rtol=0
    )
    # Each model reads with its own tokenizer: as if it were asked alone.
    torch.testing.assert_close(found.scores[:, 2:], other.scores(TEXTS, REPLIES), atol=1e-5, rtol=0)
    between = (alone[0].scores - alone[1].scores) ** 2 / 2  # the unbiased variance of two
    within = (alone[0].spread ** 2 + alone[1].spread ** 2) / 2  # pyright: ignore[reportOptionalOperand]
    assert found.spread is not None
    torch.testing.assert_close(found.spread[:, :2], (between + within).sqrt(), atol=1e-5, rtol=1e-4)
    assert found.spread[:, 2].isnan().all()


def test_which_heads_have_a_spread():
    plain = [reward_model([SAFETY, KIND], seed=seed) for seed in (1, 2)]
    assert RewardSet.of(plain[:1]).with_spread == []
    assert RewardSet.of(plain).with_spread == ["safety", "kind"]
    # A predicted variance is a regression head's; a probability has none.
    gaussian = RewardSet.of([reward_model(Layout(heads=(SAFETY, KIND), gaussian=True))])
    assert gaussian.with_spread == ["safety"]
    spread = gaussian.predict(TEXTS, REPLIES, 99).spread
    assert spread is not None and spread[:, 1].isnan().all() and (spread[:, 0] > 0).all()


def test_a_wild_predicted_variance_stays_within_the_loss_s_limits():
    model = reward_model(Layout(heads=(SAFETY,), gaussian=True))
    with torch.no_grad():
        model.model.get_parameter("score.weight")[1] *= 1e4
    spread = model.predict(model.encode(TEXTS, REPLIES)).spread
    assert spread is not None
    bounds = 0.25 * torch.exp(torch.tensor([-3.5, 3.5]))
    torch.testing.assert_close(spread.amin(), bounds[0])
    torch.testing.assert_close(spread.amax(), bounds[1])


def test_saved_models_by_specification(tmp_path: Path):
    reward_model([SAFETY, TONE], seed=1).save(tmp_path / "a")
    reward_model([SAFETY, TONE], seed=2).save(tmp_path / "b")
    reward_model([KIND], seed=3).save(tmp_path / "c")
    (tmp_path / "c" / "reward_heads.json").unlink()
    saved = read_saved([str(tmp_path / "a"), f"brief={tmp_path / 'c'}", str(tmp_path / "b")])
    models = RewardSet.of([RewardModel.load(each) for each in saved])
    assert models.names == ["safety", "tone", "brief"] and len(models.ensembles[0]) == 2
    reward_model([SAFETY, KIND]).save(tmp_path / "d")
    with pytest.raises(
        UserError, match=r"both have a head safety, but are no ensemble.*\(safety, tone; safety, kind\)"
    ):
        read_saved([str(tmp_path / "a"), str(tmp_path / "d")])


# Prompts that are too long


@pytest.mark.parametrize("starts", [False, True], ids=["plain", "start token"])
def test_a_long_prompt_loses_its_beginning_and_the_reply_nothing(starts: bool):
    tokenizer: Any = byte_tokenizer()
    if starts:
        tokenizer = WithStart(byte_tokenizer())
    model = reward_model([SAFETY, TONE])
    model.tokenizer = tokenizer
    prompts = ["".join(random.Random(k).choices("abcdef ", k=k)) for k in (40, 300, 300, 220)]
    replies = ["short", "r" * 30, "q" * 100, "s" * 35]
    encoded = model.encode(prompts, replies)  # the model has 256 positions
    extra = int(starts)
    assert encoded.truncated == 2 + extra  # the last one fits without a start token alone
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        ids, given = encoded.prompt_ids[encoded.prompt_of[i]], encoded.completion_ids[i]
        assert given == [*tokenizer.encode(reply, add_special_tokens=False), 257]
        assert ids[:extra] == [258] * extra
        kept = min(len(prompt), 256 - len(given) - extra)
        assert ids[extra:] == tokenizer.encode(prompt[len(prompt) - kept :], add_special_tokens=False)
        assert len(ids) + len(given) <= 256
    alone = torch.cat([model.scores([p], [r]) for p, r in zip(prompts, replies, strict=True)])
    torch.testing.assert_close(model.scores(prompts, replies), alone, atol=1e-5, rtol=0)
    order = [2, 3, 0, 1]
    turned = model.scores([prompts[i] for i in order], [replies[i] for i in order])
    torch.testing.assert_close(turned, alone[order], atol=1e-5, rtol=0)
    assert model.predict(encoded).truncated == encoded.truncated
    with pytest.raises(UserError, match="the reply has 261 tokens, with its prompt it may have 256"):
        model.scores(["p"], ["x" * 260])
    with pytest.raises(UserError, match="reply 2: the reply has 256 tokens"):
        model.scores(["p", "p"], ["fine", "x" * 255])


class WithStart:
    """A tokenizer that puts a start token before every text."""

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self._inner, self.bos_token_id = inner, 258

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [258] * add_special_tokens + self._inner.encode(text, add_special_tokens=False)

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return self._inner(texts, add_special_tokens=False)


# A batch


def a_prompt(text: str) -> Prompt:
    return Prompt(text=text, token_ids=[1], messages=None, columns={"gold": len(text)})


@pytest.fixture(scope="module")
def models() -> RewardSet:
    ensemble = [reward_model(Layout(heads=(SAFETY, TONE), members=2), seed=seed) for seed in (1, 2)]
    return RewardSet.of([*ensemble, reward_model([KIND], "llama", seed=3)])


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> RewardFunctions:
    module: Any = types.ModuleType("scoring_rewards")
    module.brief = lambda completions, gold, **_: [n - len(c) for n, c in zip(gold, completions, strict=True)]
    monkeypatch.setitem(sys.modules, "scoring_rewards", module)
    made = RewardFunctions(["scoring_rewards:brief"], isolation="thread")
    made(["p"], ["c"], [{"gold": 0}])
    return made


def groups() -> tuple[list[Prompt], list[str]]:
    """Six prompts, three completions each."""
    texts = [f"{TEXTS[k % 5]} {k}" for k in range(6)]
    return [a_prompt(t) for t in texts for _ in range(3)], [f"{REPLIES[i % 5]} {i}" for i in range(18)]


def scored(scorer: Scorer, order: list[int], *, overlap: bool) -> Scored:
    """The batch of `groups`, put in group by group in `order`."""
    prompts, completions = groups()
    with Scoring(scorer, overlap=overlap) as scoring:
        for g in order:
            places = list(range(3 * g, 3 * g + 3))
            scoring.put(places, [prompts[i] for i in places], [completions[i] for i in places])
        return scoring.result()


@pytest.mark.parametrize("budget", [16, 40, 4096])
def test_scores_depend_neither_on_the_order_nor_on_overlap(models, functions, budget: int):
    scorer = Scorer.create(RewardSettings(), models, functions, token_budget=budget)
    prompts, completions = groups()
    assert scorer.names == ["safety", "tone", "kind", "brief"]
    expected = models.predict([p.text for p in prompts], completions, 4096)
    for order in (list(range(6)), [3, 5, 0, 1, 4, 2]):
        found = scored(scorer, order, overlap=True)
        torch.testing.assert_close(
            found.rewards, scored(scorer, order, overlap=False).rewards, atol=1e-6, rtol=0
        )
        assert found.rewards.dtype == torch.float32 and found.rewards.shape == (18, 4)
        torch.testing.assert_close(found.rewards[:, :3], expected.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.spread[:, :3], expected.spread, atol=1e-5, rtol=1e-5, equal_nan=True)
        assert found.spread[:, 2:].isnan().all() and found.outside is None and found.truncated == 0
        brief = [len(p.text) - len(c) for p, c in zip(prompts, completions, strict=True)]
        assert found.rewards[:, 3].tolist() == brief
    whole = scorer(prompts, completions)
    torch.testing.assert_close(whole.rewards[:, :3], expected.scores, atol=1e-5, rtol=0)


def test_truncated_prompts_and_strange_replies_are_counted(models):
    class Strange:
        quantiles = (2.0, 3.0, 4.0)

        def distance(self, features: Tensor) -> Tensor:
            return torch.arange(len(features)).float()

        def outside(self, features: Tensor) -> Tensor:
            return torch.arange(len(features)) % 2 == 0

    one = RewardSet.of([reward_model([SAFETY])])
    statistics: Any = Strange()
    one.ensembles[0][0].statistics = statistics
    scorer = Scorer.create(RewardSettings(), one, None)
    found = scorer([a_prompt("p" * n) for n in (300, 10, 280)], ["a", "b", "c"])
    assert found.truncated == 2
    assert found.outside is not None and found.outside.tolist() == [True, False, True]
    assert found.distance is not None and found.distance.tolist() == [0.0, 0.5, 1.0]


def test_scores_of_functions_alone(functions):
    scorer = Scorer.create(RewardSettings(), None, functions)
    found = scorer([a_prompt("four")], ["abc"])
    assert found.rewards.tolist() == [[1.0]] and found.spread.isnan().all()


# What is compared


def a_scored() -> Scored:
    rewards = torch.tensor([[0.2, 3.0, 0.7, 4.0], [0.8, 1.0, NAN, -4.0]])
    spread = torch.tensor([[0.1, 0.5, NAN, NAN], [0.3, 0.2, NAN, NAN]])
    return Scored(rewards=rewards, spread=spread, outside=None)


def test_thresholds_turn_scores_into_passed_or_not(models, functions):
    settings = RewardSettings(thresholds={"safety": 0.8, "kind": 0.5})
    used = Scorer.create(settings, models, functions).used(a_scored())
    expected = torch.tensor([[0.0, 3.0, 1.0, 4.0], [1.0, 1.0, NAN, -4.0]])
    torch.testing.assert_close(used, expected, equal_nan=True)


def test_lower_bounds_of_a_negative_weight_take_what_is_unsure_for_worse(models, functions):
    weights = {
        name: -0.5 if name == "tone" else 1.0
        for name in Scorer.create(RewardSettings(), models, functions).names
    }
    scorer = Scorer.create(RewardSettings(lower_bounds={"tone": 1.0}, weights=weights), models, functions)
    used = scorer.used(a_scored())[:, scorer.names.index("tone")]
    torch.testing.assert_close(used, torch.tensor([3.5, 1.2]))


def test_lower_bounds_take_what_is_unsure_for_worse_in_either_direction(models, functions):
    settings = RewardSettings(lower_bounds={"safety": 2.0, "tone": 1.0}, directions={"tone": "min"})
    scorer = Scorer.create(settings, models, functions)
    given = a_scored()
    expected = torch.tensor([[0.0, 3.5, 0.7, 4.0], [0.2, 1.2, NAN, -4.0]])
    torch.testing.assert_close(scorer.used(given), expected, equal_nan=True)
    torch.testing.assert_close(given.rewards, a_scored().rewards, equal_nan=True)  # as they were
    assert scorer.weights.tolist() == [1.0, -1.0, 1.0, 1.0]
    nothing = Scorer.create(RewardSettings(), models, functions)
    torch.testing.assert_close(nothing.used(given), given.rewards, equal_nan=True)


def test_settings_that_name_nothing_or_ask_for_a_spread_that_is_not_there(models, functions):
    def refused(match: str, used: RewardSet | None = models, **settings: Any) -> None:
        with pytest.raises(UserError, match=match) as caught:
            Scorer.create(replace(RewardSettings(), **settings), used, functions)
        assert "\n" not in str(caught.value)

    refused("lower_bounds names kind, which has no spread: give a reward model", lower_bounds={"kind": 1.0})
    refused("lower_bounds names brief, which has no spread", lower_bounds={"brief": 1.0})
    refused("lower_bounds names brief, which has no spread", None, lower_bounds={"brief": 1.0})
    gaussian = RewardSet.of([reward_model(Layout(heads=(SAFETY, KIND), gaussian=True))])
    refused("lower_bounds names kind, which has no spread", gaussian, lower_bounds={"kind": 1.0})
    refused("reward.lower_bounds names 'saftey'.*did you mean safety", lower_bounds={"saftey": 1.0})
    refused("reward.thresholds names 'tune'.*did you mean tone", thresholds={"tune": 1.0})
    refused("reward.floors names 'x'", floors={"x": 1.0})
    every = dict.fromkeys(("safety", "tone", "kind", "brief"), 0.5)
    refused("reward.floors: no other objective has a weight, so there is nothing to maximise", floors=every)
