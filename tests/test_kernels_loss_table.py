"""Log-probs to loss: every row of the table against token-by-token arithmetic, in float64."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig, grpo_loss, reference
from kernel_oracles import LOSSES, Batch, around, loss_oracle, normalizer_of
from torch import Tensor

BOTH = pytest.mark.parametrize("function", [grpo_loss, reference.grpo_loss], ids=["kernel", "reference"])
EVERY_LOSS = pytest.mark.parametrize("config", LOSSES.values(), ids=LOSSES.keys())


@pytest.fixture
def batch() -> Batch:
    make = torch.Generator().manual_seed(7)
    logprobs = -3 * torch.rand(29, generator=make, dtype=torch.float64)
    return around(logprobs, 2 * torch.rand(29, generator=make, dtype=torch.float64))


def leaf(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    return torch.zeros_like(of) if found is None else found


@EVERY_LOSS
@BOTH
def test_loss_and_gradients(function, config: LossConfig, batch: Batch):
    truth = loss_oracle(config, batch, normalizer_of(config))
    logprobs = leaf(batch.logprobs)
    keywords = batch.keywords(torch.float64)
    keywords["entropy"].requires_grad_()
    advantages = torch.tensor(batch.advantages, dtype=torch.float64)
    loss, metrics = function(logprobs, advantages, config, normalizer=normalizer_of(config), **keywords)
    assert loss.ndim == 0 and loss.item() == pytest.approx(truth.loss, rel=1e-12)
    close: Any = {"rtol": 1e-10, "atol": 1e-14}
    torch.testing.assert_close(
        gradient(loss, logprobs), torch.tensor(truth.by_logprob, dtype=torch.float64), **close
    )
    by_entropy = torch.tensor(truth.by_entropy, dtype=torch.float64)
    torch.testing.assert_close(gradient(loss, keywords["entropy"]), by_entropy, **close)
    for name, value in metrics.items():
        assert value.ndim == 0 and not value.requires_grad
        assert float(value) == pytest.approx(truth.metrics[name], rel=1e-5), name
    assert metrics.keys() == (truth.metrics.keys() if function is grpo_loss else metrics.keys())


@EVERY_LOSS
def test_float32(config: LossConfig, batch: Batch):
    truth = loss_oracle(config, batch, normalizer_of(config))
    logprobs = leaf(batch.logprobs, torch.float32)
    keywords = batch.keywords(torch.float32)
    loss, _ = grpo_loss(
        logprobs, torch.tensor(batch.advantages), config, normalizer=normalizer_of(config), **keywords
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.loss, rel=2e-5)
    found, wanted = gradient(loss, logprobs), torch.tensor(truth.by_logprob)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-6)


def test_the_table_is_exercised(batch: Batch):
    """The batch reaches both sides of every switch, else the comparisons above would say little."""
    metrics = loss_oracle(LOSSES["gspo"], batch).metrics
    assert 0 < metrics["clip_low_frac"] < 1 and 0 < metrics["clip_high_frac"] < 1
    assert 0 < loss_oracle(LOSSES["grpo"], batch).metrics["clamped_frac"] < 1
    for name in ("mask", "sequence-mask", "entropy-quantile", "off-policy", "everything"):
        assert 0 < loss_oracle(LOSSES[name], batch).metrics["dropped_frac"] < 1, name
    for name, free in (
        ("ratio-cap", {"ratio_cap": None}),
        ("dual-clip", {"dual_clip": None}),
        ("sequence-dual-clip", {"dual_clip": None}),
        ("sequence-ratio-cap", {"ratio_cap": None}),
    ):
        assert loss_oracle(LOSSES[name], batch).loss != loss_oracle(replace(LOSSES[name], **free), batch).loss


@BOTH
def test_without_old_logprobs_the_ratio_is_one(function, batch: Batch):
    logprobs, advantages = leaf(batch.logprobs), torch.tensor(batch.advantages, dtype=torch.float64)
    config = LossConfig.preset("dapo")
    loss, metrics = function(logprobs, advantages, config)
    assert loss.item() == pytest.approx(-float(advantages.mean()))
    assert float(metrics["ratio_mean"]) == 1.0
    torch.testing.assert_close(gradient(loss, logprobs), -advantages / len(advantages))


@pytest.mark.parametrize("name", ["grpo", "gspo", "vespo", "dapo", "sequence-mask", "off-policy"])
@BOTH
def test_advantages_by_sequence(function, name: str, batch: Batch):
    """(S,) advantages are those of each of the sequence's tokens, also where some are zero."""
    by_sequence = torch.tensor([0.5, 9.0, -1.0, 0.0, 2.0, -0.3, 0.0, 0.8], dtype=torch.float64)
    lengths = torch.tensor([last - first for first, last in pairwise(batch.bounds)])
    batch.advantages = by_sequence.repeat_interleave(lengths).tolist()
    truth = loss_oracle(LOSSES[name], batch)
    logprobs = leaf(batch.logprobs)
    loss, _ = function(logprobs, by_sequence, LOSSES[name], **batch.keywords(torch.float64))
    assert loss.item() == pytest.approx(truth.loss, rel=1e-12)
    torch.testing.assert_close(gradient(loss, logprobs), torch.tensor(truth.by_logprob, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].entropy_quantile is None])
@BOTH
def test_micro_batches_add_up_to_the_step(function, name: str, batch: Batch):
    config, dtype = LOSSES[name], torch.float64
    sizes = {"sequence_mean": len(batch.bounds) - 1, "token_mean": sum(batch.mask), "constant": 13}
    normalizer = torch.tensor(float(sizes[config.aggregation]))
    logprobs, advantages = leaf(batch.logprobs), torch.tensor(batch.advantages, dtype=dtype)
    keywords = batch.keywords(dtype)
    whole, _ = function(logprobs, advantages, config, normalizer=normalizer, **keywords)
    bounds = keywords.pop("cu_seqlens")
    parts = torch.zeros((), dtype=dtype)
    for first, last in ((0, 3), (3, 4), (4, 8)):
        rows = slice(int(bounds[first]), int(bounds[last]))
        part, _ = function(
            logprobs[rows],
            advantages[rows],
            config,
            cu_seqlens=bounds[first : last + 1] - bounds[first],
            normalizer=normalizer,
            **{key: value[rows] for key, value in keywords.items()},
        )
        parts = parts + part
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, logprobs), gradient(whole, logprobs))


@EVERY_LOSS
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_tokens_do_not_leak(config: LossConfig, poison: float, batch: Batch):
    dtype, off = torch.float64, ~torch.tensor(batch.mask)
    clean_keywords = batch.keywords(dtype)
    advantages = torch.tensor(batch.advantages, dtype=dtype)
    clean_logprobs = leaf(batch.logprobs)
    clean, clean_metrics = grpo_loss(
        clean_logprobs, advantages, config, normalizer=normalizer_of(config), **clean_keywords
    )
    dirty_keywords = batch.keywords(dtype)
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy"):
        dirty_keywords[name][off] = poison
    dirty_keywords["entropy"].requires_grad_()
    logprobs = torch.tensor(batch.logprobs, dtype=dtype)
    logprobs[off] = poison
    logprobs.requires_grad_()
    dirty, dirty_metrics = grpo_loss(
        logprobs,
        advantages.masked_fill(off, poison),
        config,
        normalizer=normalizer_of(config),
        **dirty_keywords,
    )
    assert torch.equal(clean, dirty)
    assert torch.equal(gradient(clean, clean_logprobs), gradient(dirty, logprobs))
    assert gradient(dirty, dirty_keywords["entropy"]).isfinite().all()
    for name, value in clean_metrics.items():
        assert torch.equal(value, dirty_metrics[name]), name


@EVERY_LOSS
def test_nothing_to_learn_from(config: LossConfig, batch: Batch):
    """All tokens masked, or none at all: a loss of zero with a gradient of zero."""
    keywords = batch.keywords(torch.float32)
    logprobs = leaf(batch.logprobs, torch.float32)
    keywords["loss_mask"] = torch.zeros(29, dtype=torch.bool)
    loss, metrics = grpo_loss(logprobs, torch.ones(29), config, normalizer=13.0, **keywords)
    assert loss.item() == 0.0 and int(metrics["tokens"]) == 0
    assert torch.equal(gradient(loss, logprobs), torch.zeros(29))
    assert all(value.isfinite() for value in metrics.values())

    nothing = torch.zeros(0)
    empty = dict.fromkeys(("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy"), nothing)
    for bounds in ([0], [0, 0]):
        logprobs = torch.zeros(0, requires_grad=True)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        loss, metrics = grpo_loss(
            logprobs, nothing, config, cu_seqlens=cu_seqlens, normalizer=normalizer_of(config), **empty
        )
        loss.backward()
        assert loss.item() == 0.0 and int(metrics["tokens"]) == 0


def test_all_terms_are_finite_for_extreme_ratios():
    gaps = torch.tensor([-1e4, -700.0, -90.0, -20.0, 0.0, 20.0, 90.0, 700.0, 1e4])
    for name, config in LOSSES.items():
        logprobs = torch.full((9,), -1.0).requires_grad_()
        other = dict.fromkeys(("old_logprobs", "ref_logprobs", "rollout_logprobs"), -1.0 + gaps)
        loss, metrics = grpo_loss(
            logprobs,
            torch.linspace(-1, 1, 9),
            config,
            entropy=torch.rand(9),
            cu_seqlens=torch.tensor([0, 4, 9]),
            normalizer=2.0,
            **other,
        )
        assert loss.isfinite() and gradient(loss, logprobs).isfinite().all(), name
        assert all(value.isfinite() for value in metrics.values()), name


def test_close_policies_keep_their_divergence():
    """k3 of log-probs that differ by 1e-4 is 5e-9: lost in float32 by exp(d) - 1 - d."""
    logprobs = torch.zeros(4)
    loss, _ = grpo_loss(
        logprobs,
        torch.zeros(4),
        LossConfig(kl_coef=1.0, aggregation="token_mean"),
        ref_logprobs=torch.full((4,), 1e-3),
    )
    assert loss.item() == pytest.approx(5.0017e-7, rel=2e-3)


def test_zero_advantages_count_only_where_another_term_acts():
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0])
    logprobs, ref = torch.full((4,), -1.0), torch.zeros(4)
    _, metrics = grpo_loss(logprobs, advantages, LossConfig.preset("dapo"))
    assert int(metrics["tokens"]) == 2
    _, metrics = grpo_loss(logprobs, advantages, LossConfig.preset("dapo", kl_coef=0.1), ref_logprobs=ref)
    assert int(metrics["tokens"]) == 4


def test_double_backward_is_refused():
    logprobs = torch.randn(4, requires_grad=True)
    loss, _ = grpo_loss(logprobs, torch.randn(4), LossConfig.preset("dapo"))
    scale = torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad(loss * scale, logprobs, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


LP = torch.zeros(6)
CU = torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ({}, {"logprobs": torch.zeros(2, 3)}, ["logprobs", "(N,)", "[2, 3]"]),
        ({}, {"logprobs": LP.bfloat16()}, ["logprobs", "float32 or float64", "bfloat16"]),
        ({}, {"advantages": torch.zeros(5)}, ["advantages", "(N,) = (6,)", "(S,) = (2,)", "(5,)"]),
        ({}, {"old_logprobs": torch.zeros(5)}, ["old_logprobs", "(6,)", "(5,)"]),
        ({}, {"ref_logprobs": torch.zeros(6, 1)}, ["ref_logprobs", "(6,)", "(6, 1)"]),
        ({}, {"rollout_logprobs": torch.zeros(7)}, ["rollout_logprobs", "(6,)", "(7,)"]),
        ({}, {"entropy": torch.zeros(7)}, ["entropy", "(6,)", "(7,)"]),
        ({}, {"loss_mask": torch.ones(6)}, ["loss_mask", "bool or integer", "float32"]),
        ({}, {"loss_mask": torch.ones(4) > 0}, ["loss_mask", "(6,)", "(4,)"]),
        ({}, {"cu_seqlens": None}, ["cu_seqlens", "sequence_mean"]),
        ({}, {"cu_seqlens": CU.float()}, ["cu_seqlens", "int32 or int64", "float32"]),
        ({}, {"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ["cu_seqlens", "N = 6", "[0, 4, 3, 6]"]),
        ({}, {"cu_seqlens": torch.tensor([0, 2, 5])}, ["cu_seqlens", "N = 6", "[0, 2, 5]"]),
        ({}, {"ref_logprobs": None}, ["kl_coef = 0.04", "ref_logprobs"]),
        ({}, {"normalizer": 0.0}, ["normalizer", "positive", "0.0"]),
        ({}, {"normalizer": -2.0}, ["normalizer", "positive", "-2.0"]),
        ({}, {"normalizer": torch.ones(2)}, ["normalizer", "0-d", "(2,)"]),
        ({"mismatch": "mask"}, {}, ["mismatch", "'mask'", "rollout_logprobs"]),
        ({"aggregation": "constant"}, {}, ["constant", "normalizer"]),
        ({"entropy_coef": 0.1}, {}, ["entropy_coef", "entropy"]),
        ({"entropy_quantile": 0.1}, {}, ["entropy_quantile", "entropy"]),
    ],
)
def test_mistakes_are_named(config: dict, changes: dict, words: list[str]):
    arguments: Any = {
        "logprobs": LP,
        "advantages": torch.ones(6),
        "cu_seqlens": CU,
        "ref_logprobs": LP,
    } | changes
    with pytest.raises(ValueError) as caught:
        grpo_loss(config=LossConfig(**config), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_preset_name_is_not_a_config():
    with pytest.raises(TypeError, match="config must be a LossConfig, got str"):
        grpo_loss(LP, LP, "dapo")  # type: ignore[arg-type]
