"""The reward model's losses against loops in float64, and the gradient of a step however it is split and packed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import reward_model
from torch import Tensor

from grpo_fast.config.reward_settings import RewardLossSettings
from grpo_fast.data.rated import Comparison, RatedExample
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_fit import TrainingSet, make_optimizer, update
from grpo_fast.models.reward_loss import Targets, head_losses, weighted
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.optim.optimizer import Optimizer

NAN = float("nan")
HEADS = (
    Head(name="size", mean=2.0, std=1.5),
    Head(name="kind", kind="binary", mean=0.5, std=0.5),
    Head(name="depth", kind="ordinal", low=1.0, high=4.0, cuts=(-1.0, 0.2, 0.7)),
    Head(name="liked", kind="pairwise"),
    Head(name="speed", mean=-3.0, std=0.1),
)
LABELS = torch.tensor(
    [
        [0.1, 1.0, 4.0, NAN, -3.1],
        [9.0, 0.0, NAN, NAN, NAN],
        [NAN, 0.25, 1.0, NAN, -2.7],
        [2.5, NAN, 2.0, NAN, NAN],
        [NAN, NAN, NAN, NAN, NAN],
        [2.0, 1.0, 3.0, NAN, -3.0],
    ]
)
COMPARISONS = torch.tensor([[3, 0, 4], [3, 4, 5], [3, 1, 2], [0, 1, 3]])
MARGINS = torch.tensor([0.0, 1.0, 0.4, 2.0])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"regression": "huber", "huber_delta": 0.5},
    {"regression": "gaussian"},
    {"center_coef": 0.0},
    {"center_coef": 0.3},
]


def outputs_of(layout: Layout, size: int = 6) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Members (S, K, R), log-variances (S, noisy) and the ordinal head's cuts, wide enough for every branch."""
    draw = torch.Generator().manual_seed(5)
    members = 2 * torch.randn(size, layout.members, len(layout.heads), generator=draw)
    log_variance = 2 * torch.randn(size, len(layout.noisy), generator=draw)
    if layout.noisy:
        log_variance[0, 0], log_variance[3, 0] = 9.0, -8.0  # past the limit on either side
    return members, log_variance, [torch.tensor(HEADS[2].cuts)]


def weights_of(members: int) -> Tensor:
    drawn = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 3.0]]).repeat(3, 1)
    return drawn[:, :members] if members > 1 else torch.ones(6, 1)


def plain_losses(
    members: Tensor,
    log_variance: Tensor,
    cuts: Tensor,
    weights: Tensor,
    chosen: RewardLossSettings,
    layout: Layout,
    labels: Tensor = LABELS,
) -> Tensor:
    """(K, R) float64: every loss as its paper writes it, one label and one comparison at a time."""
    rows = []
    for k in range(members.shape[1]):
        row = []
        for r, head in enumerate(HEADS):
            total, count = torch.zeros((), dtype=torch.float64), 0.0
            for s in range(len(members)):
                label, z, weight = labels[s, r].item(), members[s, k, r], weights[s, k].item()
                if math.isnan(label):
                    continue
                if head.kind == "binary":
                    p = 1 / (1 + torch.exp(-z))
                    loss = -label * torch.log(p) - (1 - label) * torch.log(1 - p)
                elif head.kind == "ordinal":
                    loss = torch.zeros((), dtype=torch.float64)
                    for step in range(3):
                        p = 1 / (1 + torch.exp(cuts[step] - z))  # of being above level 1 + step
                        loss = loss - (torch.log(p) if label > 1 + step else torch.log(1 - p)) / 3
                else:
                    error = z - (label - head.mean) / head.std
                    loss = error**2
                    if chosen.regression == "huber":
                        delta = chosen.huber_delta
                        small = error.abs() <= delta
                        loss = 0.5 * error**2 if small else delta * (error.abs() - 0.5 * delta)
                    if chosen.regression == "gaussian":
                        t = log_variance[s, layout.noisy.index(r)].clamp(-7, 7)
                        loss = 0.5 * (error**2 / torch.exp(t) + t)
                total, count = total + weight * loss, count + weight
            for (h, better, worse), margin in zip(COMPARISONS.tolist(), MARGINS.tolist(), strict=True):
                if h == r:
                    a, b, weight = members[better, k, r], members[worse, k, r], weights[better, k].item()
                    loss = torch.log(1 + torch.exp(b - a + margin)) + chosen.center_coef * (a + b) ** 2
                    total, count = total + weight * loss, count + weight
            row.append(total / max(count, 1.0))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_loss_and_its_gradient_against_float64(options: dict[str, Any], members: int):
    chosen = RewardLossSettings(**options)
    layout = Layout(heads=HEADS, members=members, gaussian=chosen.regression == "gaussian")
    weights = weights_of(members)
    ours = [t.requires_grad_() for t in (*outputs_of(layout)[:2], *outputs_of(layout)[2])]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    targets = Targets.of_step(LABELS, weights, COMPARISONS, MARGINS)
    found = head_losses(ours[0], ours[1], ours[2:], targets, layout, chosen)
    expected = plain_losses(theirs[0], theirs[1], theirs[2], weights, chosen, layout)
    assert found.shape == (members, 5)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)

    by_head = torch.tensor([0.5, 1.0, 2.0, 0.7, 0.0])
    loss = weighted(found, targets, by_head, None)
    plain = (expected * by_head).sum() / (members * 5)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    loss.backward()
    plain.backward()
    for mine, truth in zip(ours, theirs, strict=True):
        if mine.numel():
            assert mine.grad is not None and truth.grad is not None
            torch.testing.assert_close(mine.grad.double(), truth.grad, atol=1e-6, rtol=1e-5)


def test_uncertainty_weighting_is_half_of_loss_over_variance_plus_log_variance():
    layout, chosen = Layout(heads=HEADS), RewardLossSettings()
    members, log_variance, cuts = outputs_of(layout)
    targets = Targets.of_step(LABELS, torch.ones(6, 1), COMPARISONS, MARGINS)
    losses = head_losses(members, log_variance, cuts, targets, layout, chosen)
    noise = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1], requires_grad=True)
    loss = weighted(losses, targets, torch.ones(5), noise)
    s = noise.detach().double()
    assert loss.item() == pytest.approx((0.5 * (losses[0].double() / s.exp() + s)).mean().item(), rel=1e-6)
    loss.backward()
    assert noise.grad is not None
    torch.testing.assert_close(noise.grad.double(), 0.5 * (1 - losses[0].double() / s.exp()) / 5)


def test_a_head_without_a_label_in_the_step_moves_nothing():
    layout, chosen = Layout(heads=HEADS, gaussian=True), RewardLossSettings(regression="gaussian")
    members, log_variance, cuts = outputs_of(layout)
    labels = torch.full((6, 5), NAN)
    labels[1, 0] = 0.9
    nothing = torch.empty(0, 3, dtype=torch.int64), torch.empty(0)
    for given_labels in (labels, torch.full((6, 5), NAN)):
        inputs = [t.clone().requires_grad_() for t in (members, log_variance, *cuts)]
        noise = torch.zeros(5, requires_grad=True)
        targets = Targets.of_step(given_labels, torch.ones(6, 1), *nothing)
        losses = head_losses(inputs[0], inputs[1], inputs[2:], targets, layout, chosen)
        weighted(losses, targets, torch.ones(5), noise).backward()
        moved = [t.grad.nonzero().tolist() if t.grad is not None else None for t in (*inputs, noise)]
        one = not given_labels.isnan().all()
        assert moved == [[[1, 0, 0]] * one, [[1, 0]] * one, [], [[0]] * one]
        assert losses[0, 1:].abs().max() == 0


def test_a_comparison_across_micro_batches_is_an_error_of_ours():
    targets = Targets.of_step(LABELS, torch.ones(6, 1), COMPARISONS, MARGINS)
    part = targets.of_batch(torch.tensor([5, 0, 4]))
    assert part.comparisons.tolist() == [[3, 1, 2], [3, 2, 0]] and part.margins.tolist() == [0.0, 1.0]
    assert part.total is targets.total
    with pytest.raises(AssertionError, match="different micro-batches"):
        targets.of_batch(torch.tensor([0, 1, 2]))


# One step on a model, split and packed in every way


def examples() -> list[RatedExample]:
    """Several prompts, one of them twice, a chat; labels, comparisons, both, and labels that are missing."""
    pair = (
        Comparison(head="liked", better=0, worse=1),
        Comparison(head="liked", better=2, worse=1, margin=2.0),
    )
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    return [
        RatedExample(
            prompt="Sum two and two.", replies=("4", "5, I think"), labels=({"size": 1.0}, {"kind": 0.0})
        ),
        RatedExample(
            prompt=chat,
            replies=("Light scatters.", "No idea.", "It is blue since blue light scatters more than red."),
            labels=({}, {"depth": 1.0}, {"depth": 4.0, "size": 3.5}),
            comparisons=pair,
        ),
        RatedExample(prompt="hi", replies=("",), labels=({"kind": 1.0, "speed": -3.1, "depth": 2.0},)),
        RatedExample(prompt="Sum two and two.", replies=("four",), labels=({"size": 0.0, "speed": -2.9},)),
        RatedExample(
            prompt="hi",
            replies=("hello", "go away", "hi there, how may I help?"),
            labels=({"kind": 1.0}, {}, {}),
            comparisons=(Comparison(head="liked", better=2, worse=0, margin=1.0), pair[0]),
        ),
    ]


class Recorder(Optimizer):
    """Keeps the gradient and takes no step."""

    gradient: Tensor

    def step(self, lr: float) -> tuple[float, bool]:
        self.gradient = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.parameters]
        )
        self.inner.zero_grad(set_to_none=True)
        return self.gradient.norm().item(), True


CHOSEN = RewardLossSettings(regression="gaussian", uncertainty_weighting=True)
MODEL = reward_model(Layout(heads=HEADS, members=2, gaussian=True))
DATA = TrainingSet.of(MODEL, examples(), seed=1)


def step_gradient(
    model: RewardModel, data: TrainingSet, chosen: list[int], budget: int
) -> tuple[dict, Tensor]:
    make_optimizer(model, CHOSEN, lr=0.0)
    recorder = Recorder(model.trainable_parameters(), lr=0.0)
    metrics = update(model, recorder, data, chosen, CHOSEN, lr=0.1, token_budget=budget)
    return metrics, recorder.gradient


WHOLE = step_gradient(MODEL, DATA, [0, 1, 2, 3, 4], 4096)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400), st.permutations(range(5)))
def test_the_gradient_does_not_depend_on_the_split_the_packing_or_the_order(budget: int, order: list[int]):
    metrics, gradient = step_gradient(MODEL, DATA, order, budget)
    assert WHOLE[1].isfinite().all() and WHOLE[1].norm() > 0.1
    torch.testing.assert_close(gradient, WHOLE[1], atol=2e-6, rtol=1e-4)
    for name in ("loss", *(f"loss/{head.name}" for head in HEADS)):
        assert metrics[name] == pytest.approx(WHOLE[0][name], rel=1e-4, abs=1e-6)


def test_the_step_is_the_plain_loss_of_its_replies():
    encoded, targets, _ = DATA.batch([0, 1, 2, 3, 4])
    (batch,) = MODEL.pack(encoded, 4096)
    with torch.no_grad():
        outputs = torch.empty(10, len(MODEL.layout.names))
        outputs[batch.sequence_index] = MODEL(batch)
    members, log_variance = MODEL.layout.split(outputs)
    losses = head_losses(members, log_variance, list(MODEL.cuts), targets, MODEL.layout, CHOSEN)
    assert WHOLE[0]["loss"] == pytest.approx(0.5 * losses.mean().item(), rel=1e-5)  # log_noise is 0
    assert WHOLE[0]["loss/liked"] == pytest.approx(losses[:, 3].mean().item(), rel=1e-5)


@pytest.mark.parametrize("budget", [1, 30, 60, 200, 4096])
def test_replies_of_a_comparison_stay_together_whatever_the_budget(budget: int):
    encoded, targets, bundle = DATA.batch([4, 1, 0])
    assert bundle == [0, 0, 0, 1, 1, 1, 2, 2]
    found = [batch.sequence_index.tolist() for batch in MODEL.pack(encoded, budget, bundle)]
    assert sorted(i for rows in found for i in rows) == list(range(8))
    for rows in found:
        assert all({i for i in range(8) if bundle[i] == bundle[row]} <= set(rows) for row in rows)
    assert budget > 30 or len(found) == 3
    assert budget < 4096 or len(found) == 1
    assert targets.comparisons.tolist() == [[3, 2, 0], [3, 0, 1], [3, 3, 4], [3, 5, 4]]
