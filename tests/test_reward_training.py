"""Training a reward model: the data of a step, planted truth found under noise, the same weights from the same seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from tiny_models import byte_tokenizer, causal_model, reward_model

from grpo_fast.config.reward_settings import RewardLossSettings
from grpo_fast.data.rated import Comparison, HeadSpec, RatedExample
from grpo_fast.data.ratings import Ratings
from grpo_fast.errors import UserError
from grpo_fast.models.reward_data import Head, Layout, heads_of
from grpo_fast.models.reward_fit import TrainingSet, example_batches, fit, make_optimizer, steps_of, update
from grpo_fast.models.reward_model import RewardModel

SPECS = [
    HeadSpec(name="share", kind="regression"),
    HeadSpec(name="has_z", kind="binary"),
    HeadSpec(name="level", kind="ordinal"),
    HeadSpec(name="liked", kind="pairwise"),
]
NAMES = [spec.name for spec in SPECS]


@dataclass(frozen=True)
class Planted:
    """Rated examples whose truth is known: (S, R) for their replies in order, and the noisy labels, all observed."""

    examples: list[RatedExample]
    truth: np.ndarray
    noisy: np.ndarray


def truth_of(text: str) -> list[float]:
    """share: of a. has_z: whether a z occurs. level: 1 to 4, by the number of b. liked: share of a less that of b."""
    a, b, n = text.count("a"), text.count("b"), len(text)
    return [a / n, float("z" in text), 1.0 + min(b // 2, 3), (a - b) / n]


def planted(examples: int, *, seed: int, missing: float = 0.5) -> Planted:
    """Two replies to a prompt; labels are the truth with noise about as large as itself, some of them missing."""
    draw = random.Random(seed)
    made, truth, noisy = [], [], []
    for _ in range(examples):
        replies = ["".join(draw.choices("abz", (3, 3, 0.5), k=draw.randint(3, 12))) for _ in range(2)]
        known = [truth_of(reply) for reply in replies]
        rated = [
            [
                share + draw.gauss(0, 0.25),
                z if draw.random() < 0.8 else 1 - z,
                min(4.0, max(1.0, level + draw.choice([-1, 0, 0, 1]))),
                liked + draw.gauss(0, 0.5),
            ]
            for share, z, level, liked in known
        ]
        labels = tuple(
            {name: value for name, value in zip(NAMES[:3], row, strict=False) if draw.random() >= missing}
            for row in rated
        )
        better = int(rated[1][3] > rated[0][3])
        pair = (
            (Comparison(head="liked", better=better, worse=1 - better),) if draw.random() >= missing else ()
        )
        made.append(
            RatedExample(
                prompt=draw.choice(["go:", "say:"]), replies=tuple(replies), labels=labels, comparisons=pair
            )
        )
        truth += known
        noisy += rated
    return Planted(examples=made, truth=np.array(truth), noisy=np.array(noisy))


def layout_of(examples: list[RatedExample], **options) -> Layout:
    return Layout(heads=tuple(heads_of(Ratings(examples=examples, heads=SPECS, warnings=[]))), **options)


def new_model(
    examples: list[RatedExample], *, members: int = 1, initializer_range: float = 0.02
) -> RewardModel:
    return reward_model(layout_of(examples, members=members), initializer_range=initializer_range)


def pairs_of(examples: list[RatedExample]) -> tuple[list, list[str]]:
    return [e.prompt for e in examples for _ in e.replies], [reply for e in examples for reply in e.replies]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


# Planted truth


@pytest.fixture(scope="module")
def found() -> tuple[RewardModel, Planted]:
    """An ensemble of three trained on 1500 replies, and 400 held-out ones."""
    training = planted(750, seed=0)
    model = new_model(training.examples, members=3, initializer_range=0.1)
    fit(model, training.examples, epochs=10, lr=5e-3, batch_size=32, seed=0)
    return model, planted(200, seed=1)


def test_every_head_is_nearer_to_the_truth_than_the_labels_it_learned_from(found):
    model, heldout = found
    scores = model.scores(*pairs_of(heldout.examples)).numpy()
    for k, name in enumerate(NAMES):
        ours = spearman(scores[:, k], heldout.truth[:, k])
        labels = spearman(heldout.noisy[:, k], heldout.truth[:, k])
        assert ours > labels + 0.1, f"{name}: {ours:.3f}, the labels {labels:.3f}"
    share, has_z, level = (scores[:, k] for k in range(3))
    truth = heldout.truth
    assert np.abs(share - truth[:, 0]).mean() < 0.6 * np.abs(truth[:, 0] - truth[:, 0].mean()).mean()
    assert has_z.min() > 0 and has_z.max() < 1
    assert has_z[truth[:, 1] == 1].mean() - has_z[truth[:, 1] == 0].mean() > 0.3
    means = [level[truth[:, 2] == step].mean() for step in (1, 2, 3, 4)]
    assert means == sorted(means) and level.min() >= 1 and level.max() <= 4


def test_members_of_an_ensemble_disagree_most_where_nothing_was_learned(found):
    model, heldout = found
    prompts, replies = pairs_of(heldout.examples)
    inside = model.predict(model.encode(prompts, replies))
    strange = [f"QUX {k} @@ ~~ 9#!" + "Ж" * (k % 7) for k in range(200)]
    outside = model.predict(model.encode(["go:"] * 200, strange))
    assert inside.spread is not None and outside.spread is not None
    assert inside.spread.min() > 0 and inside.spread.shape == (400, 4)
    assert (outside.spread.mean(dim=0) > 1.2 * inside.spread.mean(dim=0)).all()


def test_a_predicted_variance_finds_the_noisy_replies():
    """Labels of replies with a z are 0.4 off, all others 0.05: the spread must tell which is which."""
    training, heldout = planted(500, seed=3, missing=0.0), planted(100, seed=4)
    draw = random.Random(5)
    examples = [
        RatedExample(
            prompt=e.prompt,
            replies=e.replies,
            labels=tuple(
                {"share": truth_of(reply)[0] + draw.gauss(0, 0.4 if "z" in reply else 0.05)}
                for reply in e.replies
            ),
        )
        for e in training.examples
    ]
    heads = heads_of(Ratings(examples=examples, heads=SPECS[:1], warnings=[]))
    model = reward_model(Layout(heads=tuple(heads), gaussian=True), initializer_range=0.02)
    fit(model, examples, epochs=8, lr=5e-3, batch_size=32, loss=RewardLossSettings(regression="gaussian"))
    spread = model.predict(model.encode(*pairs_of(heldout.examples))).spread
    assert spread is not None
    noisy = torch.tensor(heldout.truth[:, 1] == 1)
    assert spread[noisy].mean() > 2 * spread[~noisy].mean()
    assert 0.2 < spread[noisy].mean() < 0.8 and spread[~noisy].mean() < 0.2


# A run of training


def test_same_seed_same_weights_whatever_the_budget():
    examples = planted(60, seed=7).examples

    def trained(**options: Any) -> tuple[RewardModel, list[float]]:
        model = new_model(examples, members=2)
        given: dict[str, Any] = {"epochs": 3, "batch_size": 20, "seed": 3}
        return model, fit(model, examples, **(given | options))

    calls: list[tuple[int, int, float]] = []
    first, losses = trained(on_step=lambda step, steps, metrics: calls.append((step, steps, metrics["loss"])))
    again, same = trained()
    assert losses == same and calls == [(k + 1, 9, loss) for k, loss in enumerate(losses)]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    _, split = trained(token_budget=60)
    assert split == pytest.approx(losses, rel=1e-3)
    _, other = trained(seed=4)
    assert other != losses


def test_learned_loss_weights_trust_the_noisier_head_less():
    draw = random.Random(0)
    examples = [
        RatedExample(
            prompt="p", replies=(text,), labels=({"clear": len(text) % 9, "noise": draw.gauss(0, 1)},)
        )
        for text in ("ab" * draw.randint(1, 9) for _ in range(64))
    ]
    heads = (Head(name="clear", mean=4.0, std=2.5), Head(name="noise"))
    model = reward_model(list(heads))
    fit(
        model,
        examples,
        epochs=150,
        lr=5e-3,
        batch_size=64,
        loss=RewardLossSettings(uncertainty_weighting=True),
    )
    clear, noise = model.log_noise.tolist()
    assert clear < noise - 0.2
    plain = reward_model(list(heads))
    fit(plain, examples, epochs=2)
    assert plain.log_noise.tolist() == [0.0, 0.0]


def test_a_head_of_weight_zero_keeps_its_output():
    examples = planted(16, seed=2).examples
    model = new_model(examples)
    before = model.model.get_parameter("score.weight").detach().clone()
    weights = RewardLossSettings(weights={"share": 0.0})
    fit(model, examples, epochs=3, weight_decay=0.0, loss=weights)
    after = model.model.get_parameter("score.weight")
    assert torch.equal(after[0], before[0]) and not torch.isclose(after[1:], before[1:], atol=1e-6).any()


def test_bfloat16_weights_train_through_float32_copies(tmp_path: Path):
    causal_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    heads = (Head(name="safety", mean=0.5, std=0.25), Head(name="harmless", kind="binary"))
    examples = [
        RatedExample(prompt="p", replies=("ab" * k,), labels=({"safety": k / 9, "harmless": float(k % 2)},))
        for k in range(10)
    ]
    ends = []
    for dtype in ("float32", "bfloat16"):
        model = RewardModel.from_backbone(tmp_path, Layout(heads=heads), dtype=dtype)
        ends.append(fit(model, examples, epochs=12, lr=1e-3, batch_size=10, token_budget=60)[-1])
    assert next(model.model.parameters()).dtype == torch.bfloat16
    assert ends[1] == pytest.approx(ends[0], rel=0.15)


# The data of a step


def test_head_statistics():
    rows: list[dict[str, float]] = [
        {"a": 1.0, "c": 1.0},
        {"a": 3.0, "c": 3.0},
        {"b": 1.0, "c": 1.0},
        {"c": 2.0},
    ]
    examples = [RatedExample(prompt="p", replies=("x",) * 4, labels=tuple(rows))]
    specs = [
        HeadSpec(name="a", kind="regression"),
        HeadSpec(name="b", kind="binary"),
        HeadSpec(name="c", kind="ordinal"),
        HeadSpec(name="d", kind="pairwise"),
    ]
    a, b, c, d = heads_of(Ratings(examples=examples, heads=specs, warnings=[]))
    assert a == Head(name="a", mean=2.0, std=1.0, low=1.0, high=3.0)
    assert b == Head(name="b", kind="binary", mean=1.0, std=1.0, low=1.0, high=1.0)
    # Half of the labels are above 1 and a quarter above 2: an output of 0 gives these shares.
    assert (c.low, c.high) == (1.0, 3.0) and c.cuts == pytest.approx((0.0, math.log(3)))
    assert d == Head(name="d", kind="pairwise")
    with pytest.raises(UserError, match="no reply has a label for e; at least one is needed"):
        heads_of(Ratings(examples=examples, heads=[HeadSpec(name="e", kind="regression")], warnings=[]))
    with pytest.raises(UserError, match="every label of b is 1; ordinal heads need two levels"):
        heads_of(Ratings(examples=examples, heads=[HeadSpec(name="b", kind="ordinal")], warnings=[]))


def test_a_batch_holds_its_examples_replies_labels_and_comparisons():
    data = planted(30, seed=9)
    model = new_model(data.examples, members=3)
    held = TrainingSet.of(model, data.examples, seed=2)
    encoded, targets, bundle = held.batch([7, 3, 20])
    assert bundle == [0, 0, 1, 1, 2, 2]
    expected = [
        (e.prompt, reply, row)
        for e in (data.examples[k] for k in (7, 3, 20))
        for reply, row in zip(e.replies, e.labels, strict=True)
    ]
    for i, (prompt, reply, row) in enumerate(expected):
        assert model.tokenizer.decode(encoded.prompt_ids[encoded.prompt_of[i]]) == prompt
        assert model.tokenizer.decode(encoded.completion_ids[i], skip_special_tokens=True) == reply
        known = {
            name: targets.labels[i, k].item()
            for k, name in enumerate(NAMES)
            if not targets.labels[i, k].isnan()
        }
        assert known == pytest.approx(row, rel=1e-6)
    pairs = [
        (3, 2 * k + e.comparisons[0].better)
        for k, e in enumerate(data.examples[j] for j in (7, 3, 20))
        if e.comparisons
    ]
    assert [(head, better) for head, better, _ in targets.comparisons.tolist()] == pairs
    # Both replies of an example are drawn together, and often enough that every member sees about as many.
    assert torch.equal(held.weights[::2], held.weights[1::2]) and held.weights.shape == (60, 3)
    assert 0.5 < held.weights.mean() < 1.5 and not torch.equal(held.weights[:, 0], held.weights[:, 1])
    assert TrainingSet.of(new_model(data.examples), data.examples).weights.unique().tolist() == [1.0]
    again = TrainingSet.of(model, data.examples, seed=2).weights
    assert torch.equal(held.weights, again)
    assert not torch.equal(held.weights, TrainingSet.of(model, data.examples, seed=3).weights)
    lengths = [len(e.prompt) + sum(len(reply) + 1 for reply in e.replies) for e in data.examples]
    assert held.lengths() == lengths


def test_margins_average_to_one_whatever_their_unit():
    pairs = [Comparison(head="liked", better=0, worse=1, margin=m) for m in (10.0, 30.0, 0.0)]
    examples = [
        RatedExample(prompt="p", replies=("a", "b"), labels=({}, {}), comparisons=(pair,)) for pair in pairs
    ]
    held = TrainingSet.of(reward_model([Head(name="liked", kind="pairwise")]), examples)
    assert [margin for row in held.comparisons for *_, margin in row] == [0.5, 1.5, 0.0]


def test_an_epoch_takes_every_example_once_in_batches_of_like_length():
    lengths = random.Random(1).choices(range(1, 500), k=200)
    batches = list(example_batches(lengths, 8, 50, seed=0))
    assert len(batches) == 50 == steps_of(200, 8, 2.0)
    for epoch in (batches[:25], batches[25:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(200))
    ranges = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert np.mean(ranges) < 100 and batches[:25] != batches[25:]
    assert batches == list(example_batches(lengths, 8, 50, seed=0))
    assert batches[:10] == list(example_batches(lengths, 8, 10, seed=0))
    assert steps_of(3, 8, 0.1) == 1


def test_labels_that_do_not_fit():
    model = reward_model([Head(name="a"), Head(name="b")])

    def given(labels: dict[str, float], reply: str = "c", **options: Any) -> None:
        fit(model, [RatedExample(prompt="p", replies=("c", reply), labels=({"a": 1.0}, labels))], **options)

    with pytest.raises(UserError, match="rated reply 2: label b is infinite"):
        given({"b": math.inf})
    with pytest.raises(UserError, match="none of 1 replies has a label; nothing to train on"):
        fit(model, [RatedExample(prompt="p", replies=("c",), labels=({},))])
    with pytest.raises(UserError, match="ratings: the reply has 41 tokens, with its prompt it may have 20"):
        given({}, "d" * 40, max_tokens=20)
    with torch.no_grad():
        model.model.get_parameter("score.weight").fill_(math.nan)
    with pytest.raises(UserError, match=r"the loss is nan at step 1; use a smaller lr than 0\.5"):
        given({}, lr=0.5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    examples = planted(4, seed=1).examples
    model = new_model(examples)
    optimizer = make_optimizer(model, RewardLossSettings(), lr=0.1)
    model.model.get_parameter("score.weight").register_hook(lambda gradient: gradient * math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    data = TrainingSet.of(model, examples)
    metrics = update(model, optimizer, data, [0, 1], RewardLossSettings(), lr=0.1, token_budget=99)
    assert metrics["skipped_updates"] == 1.0 and math.isfinite(metrics["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
