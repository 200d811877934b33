"""The loss kernel in Triton's interpreter: every row of the table against the oracle and the PyTorch path.

Blocks of a few tokens and few programs, so that every loop runs more than once and every tail is ragged.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig, grpo_loss, reference
from grpo_kernels._token_loss import evaluate, prepare
from kernel_oracles import LOSSES, Batch, around, loss_oracle, normalizer_of
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from grpo_kernels import _loss_kernels, _triton_loss

EVERY_LOSS = pytest.mark.parametrize("config", LOSSES.values(), ids=LOSSES.keys())
# one for each surrogate, level and source of coupling
ROWS = ["grpo", "gspo", "cispo", "sapo", "vespo", "k3-corrected", "sequence-mask-gspo", "entropy-quantile"]
ROWS += ["off-policy-dapo", "everything"]
SOME_LOSSES = pytest.mark.parametrize("config", [LOSSES[name] for name in ROWS], ids=ROWS)
UNCOUPLED = [name for name, config in LOSSES.items() if not config.couples_tokens]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(_triton_loss, "BLOCK", 8)
    monkeypatch.setattr(_triton_loss, "SHORTEST_BLOCK", 4)
    monkeypatch.setattr(_triton_loss, "LONGEST_BLOCK", 4)
    monkeypatch.setattr(_triton_loss, "PROGRAMS", 3)
    torch.use_deterministic_algorithms(True)  # with this, uninitialised memory holds NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def batch() -> Batch:
    make = torch.Generator().manual_seed(7)
    logprobs = -3 * torch.rand(29, generator=make, dtype=torch.float64)
    return around(logprobs, 2 * torch.rand(29, generator=make, dtype=torch.float64))


def run(
    function: Any, dtype: torch.dtype, logprobs: Any, advantages: Any, config: LossConfig, **given: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Loss, its gradients by log-probs and (if given) entropy, metrics; all values in this dtype."""
    given = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    leaves = [torch.as_tensor(logprobs).detach().to(dtype, copy=True).requires_grad_()]
    if "entropy" in given:
        given["entropy"] = given["entropy"].clone().requires_grad_()
        leaves.append(given["entropy"])
    loss, metrics = function(leaves[0], torch.as_tensor(advantages).to(dtype), config, **given)
    gradients = torch.autograd.grad(3.0 * loss, leaves, allow_unused=True)
    found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
    return [loss.detach(), *found], metrics


def same_metrics(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == () and found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-6, msg=name)


@EVERY_LOSS
def test_against_the_oracle(config: LossConfig, batch: Batch):
    truth = loss_oracle(config, batch, normalizer_of(config))
    given = batch.keywords(torch.float32) | {"normalizer": normalizer_of(config), "backend": "triton"}
    found, metrics = run(grpo_loss, torch.float32, batch.logprobs, batch.advantages, config, **given)
    assert found[0].item() == pytest.approx(truth.loss, rel=2e-5)
    for gradient, wanted in zip(found[1:], (truth.by_logprob, truth.by_entropy), strict=True):
        torch.testing.assert_close(gradient, 3 * torch.tensor(wanted), rtol=2e-4, atol=6e-6)
    assert metrics.keys() == truth.metrics.keys()
    for name, value in metrics.items():
        assert value.ndim == 0 and not value.requires_grad
        assert float(value) == pytest.approx(truth.metrics[name], rel=2e-5, abs=1e-6), name


BY_TOKEN = [(config, False) for config in LOSSES.values()]
BY_SEQUENCE = [
    (LOSSES[name], True)
    for name in ("grpo", "dapo", "gspo", "vespo", "rloo", "mask", "off-policy", "everything")
]


@pytest.mark.parametrize(("config", "by_sequence"), BY_TOKEN + BY_SEQUENCE)
def test_against_both_paths(config: LossConfig, by_sequence: bool, batch: Batch):
    """No entropy, reference or rollout where none is needed; integer mask; a normalizer on the device."""
    advantages = torch.tensor([0.5, 9.0, -1.0, 0.0, 2.0, -0.3, 0.0, 0.8])
    if not by_sequence:
        advantages = torch.tensor(batch.advantages).where(torch.arange(29) % 7 != 0, 0.0)
    given = batch.keywords(torch.float64)
    given["loss_mask"] = 3 * given["loss_mask"].int()
    given["cu_seqlens"] = given["cu_seqlens"].long()
    given["normalizer"] = torch.tensor(normalizer_of(config) or 2.5)
    if config.kl_coef == 0.0:
        del given["ref_logprobs"]
    if config.mismatch == "none":
        del given["rollout_logprobs"]
    if config.entropy_coef == 0.0 and config.entropy_quantile is None:
        del given["entropy"]
    ours, metrics = run(
        grpo_loss, torch.float32, batch.logprobs, advantages, config, backend="triton", **given
    )
    plain, plain_metrics = run(
        grpo_loss, torch.float32, batch.logprobs, advantages, config, backend="torch", **given
    )
    truth, _ = run(reference.grpo_loss, torch.float64, batch.logprobs, advantages, config, **given)
    same_metrics(metrics, plain_metrics)
    for value, other, true in zip(ours, plain, truth, strict=True):
        torch.testing.assert_close(value, other, rtol=2e-5, atol=1e-6)
        limit = 2e-5 * (true.abs().max().item() + 1e-3)
        torch.testing.assert_close(value.double(), true, rtol=0, atol=limit)


@pytest.mark.parametrize("name", ["dapo", "gspo", "vespo", "k3-corrected"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_without_old_logprobs_and_own_normalizer(masked: bool, name: str, batch: Batch):
    given = batch.keywords(torch.float32)
    del given["old_logprobs"]
    if not masked:
        del given["loss_mask"]
    both = [
        run(grpo_loss, torch.float32, batch.logprobs, batch.advantages, LOSSES[name], backend=b, **given)
        for b in ("triton", "torch")
    ]
    same_metrics(both[0][1], both[1][1])
    assert float(both[0][1]["ratio_mean"]) == pytest.approx(1.0)
    for value, other in zip(both[0][0], both[1][0], strict=True):
        torch.testing.assert_close(value, other, rtol=2e-5, atol=1e-7)


@SOME_LOSSES
def test_masked_tokens_do_not_leak(config: LossConfig, batch: Batch):
    off, nan = ~torch.tensor(batch.mask), float("nan")
    given = batch.keywords(torch.float32) | {"normalizer": normalizer_of(config), "backend": "triton"}
    logprobs, advantages = torch.tensor(batch.logprobs), torch.tensor(batch.advantages)
    clean, clean_metrics = run(grpo_loss, torch.float32, logprobs, advantages, config, **given)
    given["old_logprobs"][off] = given["entropy"][off] = nan
    given["ref_logprobs"][off] = given["rollout_logprobs"][off] = -torch.inf
    logprobs, advantages = logprobs.masked_fill(off, nan), advantages.masked_fill(off, torch.inf)
    dirty, metrics = run(grpo_loss, torch.float32, logprobs, advantages, config, **given)
    for one, other in zip((*clean, *clean_metrics.values()), (*dirty, *metrics.values()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["dapo", "gspo", "cispo", "sapo", "vespo", "k3"])
def test_a_logprob_that_is_no_number_shows(name: str, batch: Batch):
    given = batch.keywords(torch.float32)
    batch.logprobs[2] = float("nan")
    found, _ = run(
        grpo_loss, torch.float32, batch.logprobs, batch.advantages, LOSSES[name], backend="triton", **given
    )
    assert found[0].isnan()


@SOME_LOSSES
def test_nothing_to_learn_from(config: LossConfig, batch: Batch):
    """All tokens masked, one token, none at all."""
    given = batch.keywords(torch.float32) | {"backend": "triton", "normalizer": 13.0}
    given["loss_mask"] = torch.zeros(29, dtype=torch.bool)
    found, metrics = run(grpo_loss, torch.float32, batch.logprobs, torch.ones(29), config, **given)
    assert all((value == 0).all() for value in found) and int(metrics["tokens"]) == 0
    assert all(value.isfinite() for value in metrics.values())

    names = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")
    for bounds in ([0], [0, 0], [0, 1], [0, 0, 1]):
        token = -torch.ones(bounds[-1])
        some: dict[str, Any] = dict.fromkeys(names, token) | {"cu_seqlens": torch.tensor(bounds)}
        some["normalizer"] = normalizer_of(config)
        both = [
            run(grpo_loss, torch.float32, token, -token, config, backend=b, **some)
            for b in ("triton", "torch")
        ]
        same_metrics(both[0][1], both[1][1])
        for value, other in zip(both[0][0], both[1][0], strict=True):
            torch.testing.assert_close(value, other)


def test_all_terms_are_finite_for_extreme_ratios():
    gaps = torch.tensor([-1e4, -700.0, -90.0, -20.0, 0.0, 20.0, 90.0, 700.0, 1e4])
    for name, config in LOSSES.items():
        given: dict[str, Any] = dict.fromkeys(
            ("old_logprobs", "ref_logprobs", "rollout_logprobs"), gaps - 1.0
        )
        given |= {"entropy": gaps.abs(), "cu_seqlens": torch.tensor([0, 4, 9]), "normalizer": 2.0}
        found, metrics = run(
            grpo_loss,
            torch.float32,
            -torch.ones(9),
            torch.linspace(-1, 1, 9),
            config,
            backend="triton",
            **given,
        )
        assert all(value.isfinite().all() for value in (*found, *metrics.values())), name


def test_close_policies_keep_their_divergence():
    """k3 of log-probs that differ by 1e-4 is 5e-9: exp(d) - 1 - d would be rounding alone."""
    config = LossConfig(kl_coef=1.0, aggregation="token_mean")
    for distance in (1e-4, -1e-2, 0.4, 0.6, -3.0, 30.0):
        ref = torch.full((3,), distance, dtype=torch.float64)
        given = {"ref_logprobs": ref.float()}
        found, _ = run(
            grpo_loss, torch.float32, torch.zeros(3), torch.zeros(3), config, backend="triton", **given
        )
        true, _ = run(
            reference.grpo_loss,
            torch.float64,
            torch.zeros(3),
            torch.zeros(3),
            config,
            ref_logprobs=given["ref_logprobs"],
        )
        for value, exact in zip(found, true, strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=0)


def tokens_of(config: LossConfig, batch: Batch) -> tuple[Any, Tensor, Tensor]:
    given = batch.keywords(torch.float32)
    entropy = given.pop("entropy")
    advantages = torch.tensor(batch.advantages).where(torch.arange(29) % 7 != 0, 0.0)
    tokens = prepare(
        config, 29, advantages, normalizer=13.0, device=entropy.device, dtype=torch.float32, **given
    )
    return tokens, torch.tensor(batch.logprobs), entropy


@EVERY_LOSS
def test_evaluate_is_that_of_pytorch(config: LossConfig, batch: Batch):
    """The form in which a larger operation takes it."""
    tokens, logprobs, entropy = tokens_of(config, batch)
    ours = _triton_loss.evaluate(config, tokens, logprobs, entropy)
    plain = evaluate(config, tokens, logprobs, entropy)
    same_metrics(ours.metrics, plain.metrics)
    assert (ours.by_entropy is None) == (plain.by_entropy is None)
    for value, other in (
        (ours.loss, plain.loss),
        (ours.by_logprob, plain.by_logprob),
        (ours.by_entropy, plain.by_entropy),
    ):
        if value is not None and other is not None:
            torch.testing.assert_close(value, other, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", UNCOUPLED)
def test_evaluate_by_chunks(name: str, batch: Batch):
    tokens, logprobs, entropy = tokens_of(LOSSES[name], batch)
    whole = evaluate(LOSSES[name], tokens, logprobs, entropy)
    parts = [
        _triton_loss.evaluate(LOSSES[name], tokens.rows(r), logprobs[r], entropy[r], measure=False)
        for r in (slice(0, 10), slice(10, 11), slice(11, 29))
    ]
    assert not any(part.metrics for part in parts)
    by_logprob = torch.cat([part.by_logprob for part in parts])
    torch.testing.assert_close(by_logprob, whole.by_logprob, rtol=2e-5, atol=1e-7)


def test_coefficients_are_read_at_the_call(batch: Batch):
    """They may change from step to step, so the kernel has them as numbers of the call."""
    config = LOSSES["entropy-bonus"]
    given = batch.keywords(torch.float32) | {"backend": "triton"}
    for changed in (config, replace(config, entropy_coef=0.5), replace(config, kl_coef=0.7)):
        truth = loss_oracle(changed, batch)
        found, _ = run(grpo_loss, torch.float32, batch.logprobs, batch.advantages, changed, **given)
        assert found[0].item() == pytest.approx(truth.loss, rel=2e-5)


def test_strided_inputs(batch: Batch):
    wide = torch.tensor(batch.logprobs).repeat_interleave(2)[::2]
    given = {name: value.repeat_interleave(2)[::2] for name, value in batch.keywords(torch.float32).items()}
    advantages = torch.tensor(batch.advantages).repeat_interleave(2)[::2]
    assert not wide.is_contiguous()
    found = grpo_loss(wide, advantages, LOSSES["gspo"], backend="triton", **given)[0]
    assert found.item() == pytest.approx(loss_oracle(LOSSES["gspo"], batch).loss, rel=2e-5)


def test_what_it_does_not_take(monkeypatch):
    logprobs = -torch.ones(3)
    with pytest.raises(ValueError, match="float64"):
        grpo_loss(logprobs.double(), logprobs, LossConfig.preset("dapo"), backend="triton")
    with pytest.raises(ValueError, match=r"entropy_coef = 0\.1 needs the entropy"):
        grpo_loss(logprobs, logprobs, LossConfig.preset("dapo", entropy_coef=0.1), backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        grpo_loss(logprobs, logprobs, LossConfig.preset("dapo"), backend="cuda")
    monkeypatch.setattr(_loss_kernels, "token_losses", None)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got cpu.*TRITON_INTERPRET"):
        grpo_loss(logprobs, logprobs, LossConfig.preset("dapo"), backend="triton")
