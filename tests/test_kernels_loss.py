"""grpo_loss and linear_grpo_loss: every preset and table row against float64, gradients included."""
# pyright: reportCallIssue=false, reportArgumentType=false
# (unpacked leaves and options: the checker cannot count or tell them apart)

from dataclasses import replace

import pytest
import torch
from grpo_kernels import PRESETS, LossConfig, grpo_loss, linear_grpo_loss, linear_logprob, reference
from kernel_cases import N, assert_close, error, exact, named, small_chunks, tensors

CU_SEQLENS = torch.tensor([0, 9, 9, 20, 31, N], dtype=torch.int32)  # one sequence is empty
ADVANTAGES = torch.tensor([1.0, 0.5, -1.0, 0.0, 0.7])

# One configuration for each row of the table, beside the presets.
ROWS = {
    "ratio_cap": LossConfig(ratio_cap=1.5),
    "dual_clip": LossConfig(dual_clip=1.1, ratio_cap=1.4),
    "cispo by sequence": LossConfig.preset("cispo", ratio_level="sequence", clip_high=0.01),
    "sapo by sequence": LossConfig.preset("sapo", ratio_level="sequence"),
    "gspo with KL": LossConfig.preset("gspo", kl_coef=0.1),
    "k1": LossConfig(kl="k1", kl_coef=0.3),
    "k2": LossConfig(kl="k2", kl_coef=0.3),
    "k3": LossConfig(kl="k3", kl_coef=0.3),
    "k3_corrected": LossConfig(kl="k3_corrected", kl_coef=0.3),
    "truncate": LossConfig(mismatch="truncate", mismatch_high=1.1),
    "mask": LossConfig(mismatch="mask", mismatch_low=0.8, mismatch_high=1.2),
    "sequence_mask": LossConfig(mismatch="sequence_mask", mismatch_low=0.98, mismatch_high=1.05),
    "entropy_quantile": LossConfig(entropy_quantile=0.3),
    "off_policy_threshold": LossConfig(off_policy_threshold=0.001),
    "entropy_coef": LossConfig(entropy_coef=0.05),
    "entropy_coef by sequence": LossConfig.preset("gspo", entropy_coef=0.05),
    "everything": LossConfig.preset(
        "gspo",
        kl_coef=0.1,
        entropy_coef=0.02,
        mismatch="mask",
        entropy_quantile=0.5,
        off_policy_threshold=0.2,
    ),
}
CONFIGS = PRESETS | ROWS


def _batch(dtype, seed=0, on_policy=False):
    """Leaves and targets of a head, and keyword arguments of a loss around their log-probs."""
    leaves, targets = tensors(dtype=dtype, seed=seed, spread=0.5)
    random = torch.Generator().manual_seed(seed + 1)
    logprobs = reference.linear_logprob(*exact(leaves), targets)[0].detach()

    def near(spread):
        return (logprobs + spread * torch.randn(N, generator=random, dtype=torch.float64)).to(dtype)

    arguments = {
        "ref_logprobs": near(0.3),
        "rollout_logprobs": near(0.1),
        "loss_mask": torch.rand(N, generator=random) > 0.2,
        "cu_seqlens": CU_SEQLENS,
        "normalizer": 5.0,
    }
    if not on_policy:
        arguments["old_logprobs"] = near(0.2)
    return leaves, targets, arguments


def _exact_arguments(arguments):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _compare(
    backend, config, dtype, tolerance, *, frozen=False, advantages=ADVANTAGES, on_policy=False, **head
):
    leaves, targets, arguments = _batch(dtype, on_policy=on_policy)
    if frozen:
        leaves[1].requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with small_chunks(backend):
        loss, metrics = linear_grpo_loss(
            *leaves, targets, advantages.to(dtype), config, **arguments, **head, backend=backend
        )
        gradients = torch.autograd.grad(3.0 * loss, wanted)
    true_leaves = exact(leaves)
    true, true_metrics = reference.linear_grpo_loss(
        *true_leaves, targets, advantages.double(), config, **_exact_arguments(arguments), **head
    )
    expected = torch.autograd.grad(3.0 * true, true_leaves[: len(wanted)])
    assert abs(loss.item() - true.item()) <= tolerance * max(1.0, abs(true.item()))
    assert_close(gradients, expected, tolerance * 10)
    return metrics, true_metrics


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_loss_in_float64(name):
    _compare("torch", CONFIGS[name], torch.float64, 1e-12)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "vespo", "everything"])
def test_linear_loss_in_float32(name, backend, frozen):
    _compare(backend, CONFIGS[name], torch.float32, 1e-5, frozen=frozen)


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "truncate", "sequence_mask", "k3_corrected"])
def test_on_policy_old_is_current(name):
    _compare("torch", CONFIGS[name], torch.float64, 1e-12, on_policy=True)


@pytest.mark.parametrize("name", ["gspo", "vespo", "cispo", "off_policy_threshold", "everything"])
def test_advantages_by_token(name):
    """Zero advantages among others of a sequence still count in what the sequence averages."""
    advantages = torch.linspace(-1.0, 1.0, N).round(decimals=1)
    assert (advantages == 0).any()
    _compare("torch", CONFIGS[name], torch.float64, 1e-12, advantages=advantages)


def test_shaped_heads():
    config = LossConfig(entropy_coef=0.02)
    for head in ({"softcap": 3.0, "temperature": 0.8}, {"logit_scale": 0.25}):
        _compare("torch", config, torch.float64, 1e-12, **head)


@pytest.mark.parametrize("backend", ["torch"])
def test_bias_gradient(backend):
    leaves, targets = tensors(dtype=torch.float32, bias=True)
    true_leaves = exact(leaves)
    config = LossConfig.preset("dapo")
    advantages = torch.linspace(-1, 1, N)
    with small_chunks(backend):
        loss, _ = linear_grpo_loss(*leaves[:2], targets, advantages, config, backend=backend, **named(leaves))
        loss.backward()
    true, _ = reference.linear_grpo_loss(
        *true_leaves[:2], targets, advantages.double(), config, **named(true_leaves)
    )
    true.backward()
    assert_close([leaf.grad for leaf in leaves], [leaf.grad for leaf in true_leaves], 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_grpo_loss_matches_reference(name):
    leaves, targets, arguments = _batch(torch.float64)
    logprobs, entropy = (
        part.detach().requires_grad_() for part in reference.linear_logprob(*leaves, targets)
    )
    advantages = ADVANTAGES.double()
    loss, metrics = grpo_loss(logprobs, advantages, CONFIGS[name], entropy=entropy, **arguments)
    true, _ = reference.grpo_loss(logprobs, advantages, CONFIGS[name], entropy=entropy, **arguments)
    assert torch.allclose(loss, true, rtol=1e-12)
    found = torch.autograd.grad(loss, [logprobs, entropy], allow_unused=True)
    wanted = torch.autograd.grad(true, [logprobs, entropy], allow_unused=True)
    assert torch.allclose(found[0], wanted[0], atol=1e-14)
    assert (found[1] is None) == (wanted[1] is None)
    if found[1] is not None and wanted[1] is not None:
        assert torch.allclose(found[1], wanted[1], atol=1e-14)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo", "reinforce_pp", "k3_corrected", "entropy_coef"])
def test_gradcheck(name):
    """Configurations that detach nothing: the gradient is that of the value."""
    leaves, targets, arguments = _batch(torch.float64)
    inputs = [part.detach().requires_grad_() for part in reference.linear_logprob(*leaves, targets)]
    config = CONFIGS[name]
    if config.surrogate == "clip":  # wide bounds: no token sits at a kink
        config = replace(config, clip_low=0.9, clip_high=9.0)

    def op(logprobs, entropy):
        return grpo_loss(logprobs, ADVANTAGES.double(), config, entropy=entropy, **arguments)[0]

    assert torch.autograd.gradcheck(op, inputs if config.entropy_coef else [inputs[0], inputs[1].detach()])


def test_the_two_paths_agree_in_metrics():
    leaves, targets, arguments = _batch(torch.float64)
    config = CONFIGS["everything"]
    _, fused = linear_grpo_loss(*leaves, targets, ADVANTAGES.double(), config, **arguments)
    logprobs, entropy = linear_logprob(*leaves, targets)
    _, plain = grpo_loss(logprobs, ADVANTAGES.double(), config, entropy=entropy, **arguments)
    assert fused.keys() == {*plain.keys(), "invalid_targets"}
    for name, value in plain.items():
        assert torch.allclose(fused[name], value.double(), rtol=1e-9), name


def test_metrics():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    logprobs = old + torch.tensor([0.5, -0.5, 0.0, 9.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0])
    mask = torch.tensor([1, 1, 1, 0])
    config = LossConfig.preset("dapo")
    _, metrics = grpo_loss(
        logprobs,
        advantages,
        config,
        old_logprobs=old,
        ref_logprobs=logprobs,
        rollout_logprobs=old + 0.25,
        loss_mask=mask,
        entropy=torch.tensor([1.0, 2.0, 3.0, 100.0]),
    )
    expected = {"tokens": 3, "clip_high_frac": 1 / 3, "clip_low_frac": 1 / 3, "kl": 0.0, "entropy": 2.0}
    expected |= {"mismatch_mean": 0.25, "mismatch_max": 0.25, "dropped_frac": 0.0, "clamped_frac": 0.0}
    expected |= {"mismatch_k1": 0.25, "mismatch_k3": 2.718281828**-0.25 - 1 + 0.25}
    expected |= {"mismatch_square": 2.718281828**-0.5}
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value), name
    assert float(metrics["ratio_max"]) == pytest.approx(2.718281828**0.5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].entropy_quantile is None])
def test_split_of_the_batch_does_not_matter(name):
    """With the step's normalizer, the micro-batches' gradients add up, wherever the batch is cut."""
    leaves, targets, arguments = _batch(torch.float64)
    config = CONFIGS[name]
    whole, _ = linear_grpo_loss(*leaves, targets, ADVANTAGES.double(), config, **arguments)
    expected = torch.autograd.grad(whole, leaves)
    bounds = CU_SEQLENS.tolist()
    parts = []
    for first, last in ((0, 2), (2, 3), (3, 5)):
        tokens = slice(bounds[first], bounds[last])
        part = {
            key: value[tokens] if isinstance(value, torch.Tensor) and value.shape == (N,) else value
            for key, value in arguments.items()
        }
        part["cu_seqlens"] = CU_SEQLENS[first : last + 1] - CU_SEQLENS[first]
        loss, _ = linear_grpo_loss(
            leaves[0][tokens], leaves[1], targets[tokens], ADVANTAGES[first:last].double(), config, **part
        )
        parts.append(torch.autograd.grad(loss, leaves))
    for index, gradient in enumerate(expected):
        total = sum(part[index] for part in parts)
        assert torch.allclose(total, gradient, atol=1e-13), name


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_own_normalizer_is_that_of_the_call(name):
    leaves, targets, arguments = _batch(torch.float64)
    arguments["normalizer"] = None
    found, _ = linear_grpo_loss(*leaves, targets, ADVANTAGES.double(), PRESETS[name], **arguments)
    true, _ = reference.linear_grpo_loss(*leaves, targets, ADVANTAGES.double(), PRESETS[name], **arguments)
    assert torch.allclose(found, true, rtol=1e-12)
    arguments["normalizer"] = torch.tensor(2.0)
    halved, _ = linear_grpo_loss(*leaves, targets, ADVANTAGES.double(), PRESETS[name], **arguments)
    count = {"grpo": 5, "gspo": 5}.get(name) or int(arguments["loss_mask"].sum())
    assert torch.allclose(halved * 2.0, found * count, rtol=1e-12)


def test_tokens_without_gradient_never_reach_the_product(monkeypatch):
    import grpo_kernels._backends as backends

    seen = []
    plain = backends.torch_head
    monkeypatch.setattr(
        backends, "torch_head", lambda head, *rest: seen.append(len(head.hidden)) or plain(head, *rest)
    )
    leaves, targets, arguments = _batch(torch.float32)
    leaves[0].data[~arguments["loss_mask"]] = torch.nan  # what is masked may hold anything
    loss, _ = linear_grpo_loss(*leaves, targets, ADVANTAGES, LossConfig.preset("dapo"), **arguments)
    loss.backward()
    length = CU_SEQLENS.diff()
    active = arguments["loss_mask"] & (ADVANTAGES.repeat_interleave(length) != 0)
    assert seen == [int(active.sum())]
    assert leaves[0].grad is not None and (leaves[0].grad[~active] == 0).all()
    assert leaves[0].grad.isfinite().all()


def test_nothing_to_learn_from():
    leaves, targets, arguments = _batch(torch.float32)
    loss, metrics = linear_grpo_loss(*leaves, targets, torch.zeros(5), LossConfig.preset("gspo"), **arguments)
    loss.backward()
    assert float(loss.detach()) == 0.0 and int(metrics["tokens"]) == 0
    assert all(leaf.grad is not None and (leaf.grad == 0).all() for leaf in leaves)


def test_extreme_ratios_stay_finite():
    """Log ratios and distances far beyond the clamp stay finite, and the KL pulls the right way."""
    logprobs = torch.tensor([-1.0, -200.0, -5.0, -0.1], requires_grad=True)
    old = torch.tensor([-100.0, -1.0, -5.0, -300.0])
    ref = torch.tensor([-300.0, -0.5, -5.0, -0.1])
    for config in (
        LossConfig.preset("dapo", kl_coef=0.1),
        LossConfig.preset("dapo", kl="k3_corrected", kl_coef=0.1),
    ):
        loss, metrics = grpo_loss(logprobs, torch.ones(4), config, old_logprobs=old, ref_logprobs=ref)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite() and gradient.isfinite().all()
        assert gradient[1] <= 0  # far below the reference: the loss falls as the log-prob rises
        assert float(metrics["clamped_frac"]) == pytest.approx(0.75)


def test_second_backward_is_refused():
    leaves, targets, arguments = _batch(torch.float32)
    loss, _ = linear_grpo_loss(*leaves, targets, ADVANTAGES, LossConfig(), **arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        loss.backward()


def test_tied_head_adds_to_the_embedding():
    embedding = torch.nn.Embedding(29, 8)
    ids = torch.arange(12)
    config = LossConfig.preset("dapo")
    advantages = torch.linspace(-1, 1, 12)

    def gradient(op):
        embedding.zero_grad()
        op(embedding(ids), embedding.weight, ids + 3, advantages, config)[0].backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad.clone()

    assert error(gradient(linear_grpo_loss), gradient(reference.linear_grpo_loss)) < 1e-5


@pytest.mark.parametrize(
    "config,change,message",
    [
        (LossConfig(), {"ref_logprobs": None}, "kl_coef = 0.04 needs ref_logprobs"),
        (LossConfig(mismatch="mask"), {"rollout_logprobs": None}, "mismatch = 'mask' needs rollout_logprobs"),
        (LossConfig(), {"cu_seqlens": None}, "cu_seqlens is needed by aggregation='sequence_mean'"),
        (LossConfig(), {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise from 0 to N = 37"),
        (LossConfig.preset("dr_grpo"), {"normalizer": None}, "aggregation='constant' needs a normalizer"),
        (LossConfig(), {"normalizer": 0.0}, "normalizer must be positive"),
        (LossConfig(), {"loss_mask": torch.ones(N)}, "loss_mask must be bool or integer"),
        (LossConfig(), {"old_logprobs": torch.zeros(N, 1)}, r"old_logprobs must have shape \(N,\)"),
        (
            LossConfig(),
            {"advantages": torch.zeros(6)},
            r"must have shape \(N,\) = \(37,\) or \(S,\) = \(5,\)",
        ),
    ],
)
def test_bad_arguments(config, change, message):
    leaves, targets, arguments = _batch(torch.float32)
    arguments = {"advantages": ADVANTAGES} | arguments | change
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(*leaves, targets, config=config, **arguments)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: LossConfig.preset("grop"), "unknown preset 'grop'; did you mean 'grpo'"),
        (
            lambda: LossConfig.preset("dapo", clip_hi=0.3),
            "unknown loss option 'clip_hi'; did you mean 'clip_high'",
        ),
        (lambda: LossConfig(kl="k4"), "kl must be one of k1, k2, k3, k3_corrected; got 'k4'"),  # type: ignore[arg-type]
        (lambda: LossConfig(clip_low=-0.1), "clip_low must be not negative; got -0.1"),
        (
            lambda: LossConfig(surrogate="sapo", ratio_cap=3.0),
            "ratio_cap must be None unless surrogate is 'clip'",
        ),
        (lambda: LossConfig(surrogate="gamma", ratio_level="sequence"), "ratio_level must be 'token'"),
        (lambda: LossConfig(entropy_quantile=0.0), "entropy_quantile must be in"),
        (
            lambda: LossConfig(mismatch="mask", mismatch_low=3.0),
            "mismatch_low must be at most mismatch_high = 2.0; got 3.0",
        ),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()
