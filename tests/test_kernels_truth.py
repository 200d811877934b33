"""The head and the loss on top of it against formulas of the tests' own, not against the package's reference.

Eager PyTorch in the same dtype is the yardstick: ours may be no further from float64 than that.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grpo_kernels import LossConfig, grpo_loss, linear_grpo_loss, linear_logprob, reference
from kernel_cases import assert_close, error, exact, named, small_chunks, tensors
from kernel_oracles import LOSSES, around, head_oracle, loss_oracle, normalizer_of
from torch import Tensor

N, H, V = 29, 8, 521  # prime: ragged against every chunk and column block
HEADS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"bias": True, "logit_scale": 0.25, "temperature": 1.7},
    {"softcap": 2.5},
    {"bias": True, "softcap": 2.5, "logit_scale": 1.5},
]
MIXES = {"logprobs": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (1.0, -0.7)}


def mixed(outputs: tuple[Tensor, Tensor], mix: tuple[float, float]) -> Tensor:
    by_token = torch.linspace(-1, 1, len(outputs[0]), dtype=outputs[0].dtype)
    return (outputs[0] * by_token * mix[0] + outputs[1] * by_token.flip(0) * mix[1]).sum()


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("function", [linear_logprob, reference.linear_logprob], ids=["kernel", "reference"])
def test_head_in_float64(function, options: dict, mix: tuple[float, float]):
    options = dict(options)
    leaves, targets = tensors(N, H, V, dtype=torch.float64, bias=options.pop("bias", False))
    true = head_oracle(leaves[0], leaves[1], targets, **named(leaves), **options)
    with small_chunks("torch", rows=5, v=V):
        found = function(leaves[0], leaves[1], targets, **named(leaves), **options)
        gradients = torch.autograd.grad(mixed(found, mix), leaves)
    assert_close(found, true, 1e-12)
    assert_close(gradients, torch.autograd.grad(mixed(true, mix), leaves), 1e-11)


def test_masked_vocabulary_is_as_if_absent():
    """-inf in the bias: the same as a head without those columns, whose gradient is zero there."""
    leaves, _ = tensors(N, H, V, dtype=torch.float64)
    kept = torch.arange(V) % 7 != 3
    bias = torch.zeros(V, dtype=torch.float64).masked_fill(~kept, -torch.inf)
    place = torch.randint(0, int(kept.sum()), (N,))
    true = head_oracle(leaves[0], leaves[1][kept], place)
    wanted = torch.autograd.grad(mixed(true, (1.0, 1.0)), leaves)
    for frozen in (False, True):
        weight = leaves[1].detach() if frozen else leaves[1]
        found = linear_logprob(leaves[0], weight, kept.nonzero()[place, 0], bias=bias)
        assert_close(found, true, 1e-12)
        gradients = torch.autograd.grad(mixed(found, (1.0, 1.0)), leaves[: 1 if frozen else 2])
        assert_close(gradients, wanted[: len(gradients)], 1e-11)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=str)
def test_no_further_from_the_truth_than_eager(options: dict, dtype: torch.dtype, frozen: bool):
    leaves, targets = tensors(N, 64, V, dtype=dtype, spread=0.3)
    trained = leaves[:1] if frozen else leaves
    leaves[1].requires_grad_(not frozen)

    def eager() -> tuple[Tensor, Tensor]:
        logits = F.linear(leaves[0], leaves[1])
        if "softcap" in options:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        every = torch.log_softmax(logits.float() / options.get("temperature", 1.0), -1)
        return every[torch.arange(N), targets], -(every.exp() * every).sum(-1)

    truth_leaves = exact(leaves)
    truth = head_oracle(truth_leaves[0], truth_leaves[1], targets, **options)
    wanted = torch.autograd.grad(mixed(truth, (1.0, 0.3)), truth_leaves[: len(trained)])
    theirs, ours = eager(), linear_logprob(leaves[0], leaves[1], targets, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert_close(ours, truth, 3e-6)  # whatever the dtype of the inputs: logits are float32
    for found, yardstick, true in zip(ours, theirs, truth, strict=True):
        assert error(found, true) <= error(yardstick, true) + 1e-6
    their_gradients = torch.autograd.grad(mixed(theirs, (1.0, 0.3)), trained)
    gradients = torch.autograd.grad(mixed(ours, (1.0, 0.3)), trained)
    for found, yardstick, true in zip(gradients, their_gradients, wanted, strict=True):
        assert found.dtype == dtype
        assert error(found, true) <= error(yardstick, true) + torch.finfo(dtype).eps


def test_every_target_of_a_vocabulary():
    """Each column once the target, so also the first and last of every column block."""
    (hidden, weight), _ = tensors(V, H, V, dtype=torch.float64)
    targets = torch.arange(V, dtype=torch.int32)
    true = head_oracle(hidden, weight, targets)
    with small_chunks("torch", rows=64, v=V):
        found = linear_logprob(hidden, weight, targets)
        gradients = torch.autograd.grad(mixed(found, (1.0, 0.5)), [hidden, weight])
    assert_close(found, true, 1e-12)
    assert_close(gradients, torch.autograd.grad(mixed(true, (1.0, 0.5)), [hidden, weight]), 1e-11)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_logits_given_one_by_one(frozen: bool):
    """With the identity as head the hidden states are the logits: rows that break a careless softmax."""
    size = 300
    logits = torch.randn(14, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[1] *= 1e4  # anywhere up to ±4e4, the target somewhere in it
    logits[2] = 1e4
    logits[3] = -1e4
    logits[4] = logits[5]  # identical rows, and identical targets below
    logits[6] = torch.linspace(0.0, -1e4, size)
    logits[7] -= 1e4  # ordinary, far below zero
    logits[8] = torch.where(torch.arange(size) == 77, -900.0, -1e4)  # peaked on the target, far below zero
    for row, depth in enumerate((39.0, 41.0, 42.0, 88.0, 104.0), start=9):  # about the switches of the sweep
        logits[row, -1] = -depth
    targets = torch.tensor([0, 5, 9, 9, 7, 7, size - 1, 3, 77] + [size - 1] * 5)
    hidden = logits.float().requires_grad_()
    weight = torch.eye(size).requires_grad_(not frozen)
    exactly = hidden.detach().double().requires_grad_()
    every = torch.log_softmax(exactly, -1)
    true = every[torch.arange(14), targets], -(every.exp() * every).sum(-1)
    found = linear_logprob(hidden, weight, targets)
    off = [(ours.double() - wanted).abs().detach() for ours, wanted in zip(found, true, strict=True)]
    assert (off[0] <= 3e-6 * (1 + true[0].abs())).all()
    # A frozen head takes the entropy from dX: true to the logits' rounding rather than to its own.
    rounding = 2.0**-22 * logits.abs().amax(1) if frozen else 0.0
    assert (off[1] <= 3e-6 * (1 + true[1].abs()) + rounding).all()
    assert found[0][4] == found[0][5]
    for ours, wanted, tolerance in zip(found, true, (3e-6, 1e-3), strict=True):
        (gradient,) = torch.autograd.grad(ours.sum(), hidden, retain_graph=True)
        (expected,) = torch.autograd.grad(wanted.sum(), exactly, retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("trained", ["all", "hidden", "weight"])
@pytest.mark.parametrize("config", LOSSES.values(), ids=LOSSES.keys())
def test_loss_head_in_float64(config: LossConfig, trained: str):
    """Loss and metrics token by token, and its derivatives carried through the head by autograd."""
    leaves, targets = tensors(N, H, V, dtype=torch.float64, spread=0.5)
    logprobs, entropy = head_oracle(leaves[0], leaves[1], targets)
    batch = around(logprobs, entropy)
    truth = loss_oracle(config, batch, normalizer_of(config))
    wanted = torch.autograd.grad(
        (logprobs, entropy),
        leaves,
        grad_outputs=[
            torch.tensor(part, dtype=torch.float64) for part in (truth.by_logprob, truth.by_entropy)
        ],
    )
    asked = [i for i, name in enumerate(("hidden", "weight")) if trained in ("all", name)]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in asked)
    # what is masked may hold anything
    hidden = leaves[0].detach().clone()
    hidden[~torch.tensor(batch.mask)] = torch.nan
    hidden.requires_grad_(0 in asked)
    inputs = [hidden, leaves[1]]
    with small_chunks("torch", rows=5, v=V):
        loss, metrics = linear_grpo_loss(
            hidden,
            leaves[1],
            targets,
            torch.tensor(batch.advantages, dtype=torch.float64),
            config,
            normalizer=normalizer_of(config),
            **batch.keywords(torch.float64, entropy=False),
        )
        gradients = torch.autograd.grad(2.0 * loss, [inputs[i] for i in asked])
    assert loss.item() == pytest.approx(truth.loss, rel=1e-10)
    assert_close(gradients, [2.0 * wanted[i] for i in asked], 1e-10)
    assert metrics.pop("invalid_targets").item() == 0
    assert metrics.keys() == truth.metrics.keys()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(truth.metrics[name], rel=1e-5), name


@pytest.mark.parametrize("config", LOSSES.values(), ids=LOSSES.keys())
def test_empty_call(config: LossConfig):
    """No token at all, as a rank may have that only pads: loss zero, gradients zero."""
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    nothing = torch.zeros(0)
    per_token = dict.fromkeys(("old_logprobs", "ref_logprobs", "rollout_logprobs"), nothing)
    loss, metrics = linear_grpo_loss(
        hidden,
        weight,
        torch.zeros(0, dtype=torch.int64),
        nothing,
        config,
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        normalizer=3.0,
        **per_token,
    )
    loss.backward()
    assert loss.item() == 0.0 and int(metrics["tokens"]) == 0
    assert hidden.grad is not None and hidden.grad.shape == (0, H)
    assert weight.grad is not None and not weight.grad.any()


def test_without_autograd_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch):
    """Under no_grad leaves still say requires_grad; an evaluation must not pay for a backward."""
    import grpo_kernels._backends as backends

    asked = []
    plain = backends.torch_head

    def watched(head, needs, coefficients):
        asked.append(bool(needs))
        return plain(head, needs, coefficients)

    monkeypatch.setattr(backends, "torch_head", watched)
    leaves, targets = tensors(N, H, V, dtype=torch.float32)
    frozen_weight = leaves[1].detach()
    with torch.no_grad():
        linear_logprob(leaves[0], leaves[1], targets)
        linear_logprob(leaves[0], frozen_weight, targets)
        linear_grpo_loss(leaves[0], leaves[1], targets, torch.ones(N), LossConfig.preset("dapo"))
        linear_grpo_loss(leaves[0], frozen_weight, targets, torch.ones(N), LossConfig.preset("dapo"))
    assert asked == [False] * 4


@pytest.mark.parametrize("trained", ["all", "hidden"])
def test_double_backward_is_refused(trained: str):
    leaves, targets = tensors(N, H, V, dtype=torch.float32)
    leaves[1].requires_grad_(trained == "all")
    config = LossConfig.preset("dapo")
    logprobs, _ = linear_logprob(leaves[0], leaves[1], targets)
    outputs = (
        logprobs.sum(),
        grpo_loss(logprobs, torch.ones(N), config)[0],
        linear_grpo_loss(leaves[0], leaves[1], targets, torch.ones(N), config)[0],
    )
    scale = torch.ones((), requires_grad=True)
    for output in outputs:
        (first,) = torch.autograd.grad(output * scale, leaves[0], create_graph=True)
        with pytest.raises(RuntimeError):
            first.sum().backward()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_bfloat16_is_far_nearer_the_truth_than_eager(frozen: bool):
    """Log-probs within 1e-5 of float64 on the same inputs, gradients within the rounding of their own bfloat16."""
    leaves, targets = tensors(128, 256, 3001, dtype=torch.bfloat16, spread=3.0 / 16)
    trained = leaves[:1] if frozen else leaves
    leaves[1].requires_grad_(not frozen)
    exactly = exact(leaves)
    true = torch.log_softmax(exactly[0] @ exactly[1].T, -1)[torch.arange(128), targets]
    eager = torch.log_softmax(F.linear(leaves[0], leaves[1]), -1)[torch.arange(128), targets]
    ours, _ = linear_logprob(leaves[0], leaves[1], targets)
    off = float((ours.double() - true).abs().max())
    assert off <= 1e-5 and off <= float((eager.double() - true).abs().max()) / 4
    wanted = torch.autograd.grad(true.sum(), exactly[: len(trained)])
    theirs = torch.autograd.grad(eager.float().sum(), trained)
    for found, yardstick, exactly_so in zip(
        torch.autograd.grad(ours.sum(), trained), theirs, wanted, strict=True
    ):
        rounding = error(exactly_so.bfloat16(), exactly_so)  # of the very truth: no result can be nearer
        assert error(found, exactly_so) <= min(5e-3, 1.02 * rounding) < error(yardstick, exactly_so)
