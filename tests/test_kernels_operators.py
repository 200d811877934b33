"""The operators as PyTorch sees them: compiled, exported, traced with fake tensors, under autocast."""

import pytest
import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss, linear_grpo_loss, linear_logprob
from kernel_cases import H, N, V, tensors

ADVANTAGES = torch.linspace(-1, 1, N)
CONFIG = LossConfig.preset("gspo", kl_coef=0.1)
CU_SEQLENS = torch.tensor([0, 5, 5, 20, N])


def logprob_program(hidden, weight, targets):
    logprobs, entropy = linear_logprob(hidden * 2, weight, targets, temperature=0.7, softcap=5.0)
    return (logprobs.exp() + 0.1 * entropy).sum()


def loss_program(hidden, weight, targets):
    old = torch.linspace(-4, -2, N)
    loss, metrics = linear_grpo_loss(
        hidden * 2,
        weight,
        targets,
        ADVANTAGES,
        CONFIG,
        old_logprobs=old,
        ref_logprobs=old - 0.1,
        cu_seqlens=CU_SEQLENS,
        normalizer=4.0,
    )
    return loss * 3 + metrics["kl"]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("program", [logprob_program, loss_program])
def test_compiled_in_one_graph(program, frozen):
    leaves, targets = tensors(dtype=torch.float32)
    leaves[1].requires_grad_(not frozen)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    plain = program(leaves[0], leaves[1], targets)
    wanted = torch.autograd.grad(plain, trained)
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")(leaves[0], leaves[1], targets)
    found = torch.autograd.grad(compiled, trained)
    torch.testing.assert_close(compiled, plain)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_numbers_that_change_from_call_to_call_stay_in_one_graph():
    leaves, targets = tensors(dtype=torch.float32)
    config = LossConfig.preset("dapo")

    def program(number):
        return linear_grpo_loss(
            leaves[0],
            leaves[1],
            targets,
            ADVANTAGES,
            config,
            temperature=number,
            logit_scale=number,
            normalizer=number,
        )[0]

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for number in (1.0, 0.7, 1.3):
        torch.testing.assert_close(compiled(number), program(number))


@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_losses_and_advantages_compiled_in_one_graph(coef):
    config = LossConfig.preset("dapo", entropy_coef=coef)
    rewards = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    logprobs = torch.linspace(-3, -1, 12).requires_grad_()
    entropy = torch.linspace(0, 1, 12).requires_grad_()

    def program(logprobs, entropy):
        advantages = group_advantages(rewards, group_sizes=[4, 3, 5], weights=[1.0, 0.5, 2.0])
        loss, metrics = grpo_loss(
            logprobs * 2, advantages, config, entropy=entropy, old_logprobs=logprobs.detach() * 2.1
        )
        return loss * 3 + metrics["ratio_mean"]

    plain, compiled = (
        f(logprobs, entropy) for f in (program, torch.compile(program, fullgraph=True, backend="aot_eager"))
    )
    torch.testing.assert_close(compiled, plain)
    leaves = [logprobs, entropy] if coef else [logprobs]
    found, wanted = (torch.autograd.grad(value, leaves) for value in (compiled, plain))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    if not coef:
        assert torch.autograd.grad(program(logprobs, entropy), entropy, allow_unused=True) == (None,)


def test_exported_forward():
    class Scores(torch.nn.Module):
        def forward(self, hidden, weight, targets):
            return linear_logprob(hidden, weight, targets)

    leaves, targets = tensors(dtype=torch.float32)
    inputs = (leaves[0].detach(), leaves[1].detach(), targets)
    count = torch.export.Dim("count", min=2, max=4096)
    program = torch.export.export(Scores(), inputs, dynamic_shapes=({0: count}, None, {0: count})).module()
    for rows in (slice(None), slice(0, 7)):
        found = program(inputs[0][rows], inputs[1], targets[rows])
        for ours, wanted in zip(
            found, linear_logprob(inputs[0][rows], inputs[1], targets[rows]), strict=True
        ):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)])
def test_the_dispatcher_finds_nothing_wrong(needs):
    """Schema, fake implementation and autograd registration agree with what the operators do."""
    leaves, targets = tensors(dtype=torch.float32, bias=True)
    hidden, weight, bias = (leaf.requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True))
    frozen = needs == (True, False, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    head = (hidden, weight, targets, bias)
    torch.library.opcheck(
        torch.ops.grpo_kernels.linear_logprob, (*head, 0.7, 5.0, 1.5, "torch", frozen), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.grpo_kernels.linear_logprob_backward,
        (
            *(None if leaf is None else leaf.detach() for leaf in head),
            ADVANTAGES,
            None,
            1.0,
            None,
            1.0,
            "torch",
            list(needs),
        ),
        test_utils=checks,
    )
    key = LossConfig.preset("dapo").key
    per_token = (ADVANTAGES, None, None, None, None, None, None, 3.0, key)
    torch.library.opcheck(
        torch.ops.grpo_kernels.linear_grpo_loss,
        (*head, *per_token, 1.0, None, 1.0, "torch", list(needs)),
        test_utils=checks,
    )


def test_under_autocast_the_product_runs_as_a_linear_layer_would():
    leaves, targets = tensors(dtype=torch.float32)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_logprob(leaves[0], leaves[1], targets)
        loss, _ = linear_grpo_loss(leaves[0], leaves[1], targets, ADVANTAGES, LossConfig.preset("dapo"))
    for ours, wanted in zip(found, linear_logprob(half[0], half[1], targets), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, wanted)
    expected, _ = linear_grpo_loss(half[0], half[1], targets, ADVANTAGES, LossConfig.preset("dapo"))
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, leaves)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, half), strict=True):
        assert ours.dtype == torch.float32  # that of the leaf
        assert torch.equal(ours, wanted.float())


def test_without_gradients_none_is_computed(monkeypatch):
    import grpo_kernels._torch_head as torch_head

    def refuse(*_):
        raise AssertionError("a gradient was computed")

    for name in ("finish", "grad_hidden", "add_grad_weight"):
        monkeypatch.setattr(torch_head._TorchSteps, name, refuse)
    leaves, targets = tensors(dtype=torch.float32)
    with torch.no_grad():
        loss, _ = linear_grpo_loss(leaves[0], leaves[1], targets, ADVANTAGES, LossConfig.preset("dapo"))
        logprobs, _ = linear_logprob(leaves[0], leaves[1], targets)
    assert not loss.requires_grad and not logprobs.requires_grad


def test_gradients_hold_no_graph():
    leaves, targets = tensors(dtype=torch.float32)
    loss, _ = linear_grpo_loss(leaves[0], leaves[1], targets, ADVANTAGES, LossConfig.preset("dapo"))
    (2 * loss).backward()
    logprobs, _ = linear_logprob(leaves[0], leaves[1].detach(), targets)
    (d_hidden,) = torch.autograd.grad(logprobs.sum(), leaves[0])
    for gradient in (leaves[0].grad, leaves[1].grad, d_hidden):
        assert gradient is not None and not gradient.requires_grad and gradient.grad_fn is None


def test_a_configuration_survives_its_key():
    config = LossConfig.preset("vespo", mismatch="mask", ratio_cap=None, entropy_quantile=0.2)
    assert LossConfig.from_key(config.key) == config
    assert hash(LossConfig.from_key(config.key)) == hash(config)


def test_no_rows_and_one_row():
    leaves, targets = tensors(dtype=torch.float32)
    for count in (0, 1):
        hidden = leaves[0].detach()[:count].requires_grad_()
        loss, metrics = linear_grpo_loss(
            hidden, leaves[1], targets[:count].int(), torch.ones(count), LossConfig.preset("dapo")
        )
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, leaves[1]))
        assert int(metrics["tokens"]) == count
        assert d_hidden.shape == (count, H) and d_weight.shape == (V, H)
        assert bool(d_weight.any()) == (count > 0)


def test_a_masked_token_may_have_any_target():
    leaves, targets = tensors(dtype=torch.float32)
    mask = torch.ones(N, dtype=torch.bool)
    mask[[0, 7]] = False
    config = LossConfig.preset("dapo")
    plain, _ = linear_grpo_loss(leaves[0], leaves[1], targets, ADVANTAGES, config, loss_mask=mask)
    targets[~mask] = -100
    loss, metrics = linear_grpo_loss(leaves[0], leaves[1], targets, ADVANTAGES, config, loss_mask=mask)
    assert torch.equal(loss, plain) and int(metrics["invalid_targets"]) == 0
    with pytest.raises(ValueError, match=r"targets must lie in \[0, V\) = \[0, 301\), got -100"):
        linear_grpo_loss(leaves[0], leaves[1], targets, ADVANTAGES, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"off_policy_threshold": float("nan")}, "off_policy_threshold must be a finite number; got nan"),
        ({"gamma_pos": (2.0,)}, r"gamma_pos must be a tuple of two positive numbers; got \(2.0,\)"),
        ({"clip_low": "0.2"}, "clip_low must be a finite number; got '0.2'"),
        ({"kl_coef": float("inf")}, "kl_coef must be a finite number; got inf"),
    ],
)
def test_numbers_of_a_loss_that_are_none(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_numbers_of_the_advantages_that_are_none():
    rewards = torch.randn(8, 2)
    for given, message in (
        ({"weights": [float("nan"), 1.0]}, "weights must be finite"),
        ({"eps": float("nan")}, "std_floor and eps must be finite"),
        ({"group_sizes": [4.5, 3.5]}, r"group_sizes must be integers of shape \(P,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            group_advantages(rewards, **given)  # type: ignore[arg-type]


def test_a_normalizer_that_divides_by_nothing():
    logprobs = torch.zeros(3)
    for number in (0.0, -2.0):
        with pytest.raises(ValueError, match="normalizer must be positive"):
            grpo_loss(logprobs, torch.ones(3), LossConfig.preset("dapo"), normalizer=torch.tensor(number))
