"""The fused backend in Triton's interpreter, against the float64 reference and the triton backend.

Tiles of 16 rows and 64 columns, chunks of 24 tokens: several tiles, groups and chunks even of tiny shapes, and
every edge ragged. Uninitialised memory holds NaN.
"""
# pyright: reportCallIssue=false, reportArgumentType=false
# (unpacked leaves and options: the checker cannot count or tell them apart)

from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig, linear_grpo_loss, linear_logprob, reference
from grpo_kernels._backends import run_head
from grpo_kernels._head import Head, HeadOutput, Needs
from kernel_cases import (
    DTYPES,
    OPTIONS,
    TOLERANCE,
    assert_no_tokens_give_no_gradient,
    assert_strided_is_the_same,
    compare,
    hard_rows,
    problem,
)
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from grpo_kernels import _fused_head, _triton_head
from grpo_kernels._fused_kernels import Tile
from grpo_kernels._row_kernels import Launch


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Small tiles, chunks and blocks; descriptors where the GPU's tiles would have them."""
    monkeypatch.setattr(
        _fused_head, "tile_for", lambda *_, describable: Tile(16, 64, 32, 2, 4, descriptors=describable)
    )
    monkeypatch.setattr(_fused_head, "FINISH", {"BLOCK_ROWS": 8, "BLOCK_TILES": 2})
    monkeypatch.setattr(_fused_head, "FORWARD_ROWS", 24)
    monkeypatch.setattr(_fused_head, "BIAS_ROWS", 5)
    monkeypatch.setattr(_fused_head, "REFERENCE_BLOCK", 16)
    monkeypatch.setattr(_triton_head, "CHUNK_ROWS", 24)
    monkeypatch.setattr(_triton_head, "TILE_ROWS", 8)
    monkeypatch.setattr(_triton_head, "launch_for", lambda *_: Launch(128, 4))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(inputs: list[Tensor], targets: Tensor, entropy_gradient: bool = False, **options: Any) -> None:
    compare(
        inputs,
        targets,
        options,
        entropy_gradient=entropy_gradient,
        tolerance=TOLERANCE[inputs[0].dtype],
        backend="fused",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [21, 40])  # by pointers, by descriptors
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1), (16, 64), (41, 133)])
def test_ragged_shapes(count, vocabulary, width, dtype):
    hidden, weight, targets = problem(count, vocabulary, dtype, width)
    assert _fused_head._describable(weight) == (width == 40)
    check([hidden * width**-0.5, weight], targets)


def test_several_groups_of_row_tiles(monkeypatch):
    monkeypatch.setattr(_fused_head, "FORWARD_ROWS", 300)
    hidden, weight, targets = problem(297, 150, torch.float32)
    ours = linear_logprob(hidden, weight, targets, backend="fused")
    truth = reference.linear_logprob(hidden.double(), weight.double(), targets)
    for found, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=0, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, entropy_gradient, dtype):
    hidden, weight, targets = problem(27, 109, dtype)
    inputs = [hidden, weight]
    options = dict(options)
    if options.pop("bias", False):
        inputs.append(torch.linspace(-2.0, 2.0, 109).to(dtype))
        masked = (
            -100.0 if "softcap" in options else -torch.inf
        )  # the reference's tanh has no derivative there
        inputs[2][5] = inputs[2][108] = masked
        targets[(targets == 5) | (targets == 108)] = 6
    check(inputs, targets, entropy_gradient, **options)


@pytest.mark.parametrize("softcap", [None, 60.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_rows(monkeypatch, dtype, softcap):
    """Hard rows among easy ones: alone in their tile, in tiles without any, and in several chunks."""
    monkeypatch.setattr(  # the width is the vocabulary's here: in one go
        _fused_head, "tile_for", lambda *_, describable: Tile(16, 64, 256, 2, 4, descriptors=describable)
    )
    logits, targets = hard_rows()
    easy = torch.randn(50, 150, generator=torch.Generator().manual_seed(1))
    places = torch.tensor([0, 3, 5, 16, 23, 24, 25, 49])
    easy[places] = logits
    every = torch.arange(50) % 150
    every[places] = targets
    wide = torch.cat([easy, torch.zeros(50, 2)], 1)  # rows of whole 16 bytes
    check([wide.to(dtype), torch.eye(150, 152).to(dtype)], every, softcap=softcap)


def test_row_done_again_far_below_zero():
    """The maximum is over the vocabulary: the tile's padding has logit 0, and every exponential vanishes there."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[-350.0, 1.0], [-1200.0, 2.0], [-349.0, 3.0]])
    check([hidden, weight], torch.tensor([1, 0]))


def test_nearly_certain_target_keeps_relative_precision():
    hidden = torch.tensor([[12.0, 0.0, 0.0], [30.0, 0.0, 0.0], [60.0, 0.0, 0.0]])
    targets = torch.zeros(3, dtype=torch.long)
    logprobs, _ = linear_logprob(hidden, torch.eye(3), targets, backend="fused")
    rest = 2 * torch.exp(-hidden[:, 0].double())
    torch.testing.assert_close(logprobs.double(), -rest.log1p(), rtol=1e-6, atol=0)


def test_strided_inputs_and_int32_targets():
    assert_strided_is_the_same("fused")


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig.preset("grpo"),
        LossConfig.preset("dapo"),
        LossConfig.preset("gspo", clip_low=0.2, clip_high=0.2),
        LossConfig.preset("cispo"),
        LossConfig.preset("sapo", entropy_coef=0.05),
    ],
    ids=["grpo", "dapo", "gspo", "cispo", "sapo-entropy"],
)
def test_same_loss_and_gradients_as_triton(config, frozen):
    hidden, weight, targets = problem(31, 100, torch.float32)
    noise = torch.randn(2, 31, generator=torch.Generator().manual_seed(1))
    around = linear_logprob(hidden, weight, targets)[0] + 0.3 * noise

    def run(backend: str) -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        loss, metrics = linear_grpo_loss(
            *leaves,
            targets,
            torch.tensor([1.0, -0.5, 0.3]),
            config,
            old_logprobs=around[0],
            ref_logprobs=around[1],
            cu_seqlens=torch.tensor([0, 9, 10, 31], dtype=torch.int32),
            loss_mask=torch.arange(31) != 6,
            backend=backend,
        )
        gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
        return [loss.detach(), *gradients, *metrics.values()]

    for ours, other in zip(run("fused"), run("triton"), strict=True):
        assert other.abs().max() > 0 or ours.abs().max() == 0
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5 * (float(other.abs().max()) + 1e-3))


def everything(head: Head) -> HeadOutput:
    """Log-probs, entropies and both gradients of the sum of the log-probs that are numbers."""
    return run_head(
        head,
        Needs(hidden=True, weight=True),
        lambda rows, logprobs, _: ((~logprobs.isnan()).float(), None),
        "fused",
    )


def test_target_out_of_range_touches_nothing_else():
    hidden, weight, targets = problem(30, 70, torch.float32)
    wrong = {2: -1, 7: 70, 8: 127, 17: 10**12, 29: -(10**12)}
    right = torch.tensor([row not in wrong for row in range(30)])
    for row, target in wrong.items():
        targets[row] = target
    ours = everything(Head(hidden, weight, targets, None, 1.0, None, 1.0))
    assert torch.equal(ours.logprobs.isnan(), ~right)
    leaves = [hidden[right].double().requires_grad_(), weight.double().requires_grad_()]
    logprobs, entropy = reference.linear_logprob(*leaves, targets[right])
    assert ours.hidden is not None and ours.weight is not None
    d_hidden, d_weight = torch.autograd.grad(logprobs.sum(), leaves)
    assert not ours.hidden[~right].any()
    pairs = [
        (ours.logprobs[right], logprobs),
        (ours.entropy[right], entropy),
        (ours.hidden[right], d_hidden),
        (ours.weight, d_weight),
    ]
    for found, true in pairs:
        atol = 1e-5 * float(true.detach().abs().max())
        torch.testing.assert_close(found.double(), true, rtol=0, atol=atol)


def test_no_tokens():
    assert_no_tokens_give_no_gradient("fused")


def test_refusals(monkeypatch):
    hidden, weight, targets = problem(3, 5, torch.float32)
    with pytest.raises(ValueError, match="'fused' does not take float64"):
        linear_logprob(hidden.double(), weight.double(), targets, backend="fused")
    monkeypatch.setattr(_triton_head, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"'fused' needs CUDA tensors, got cpu.*TRITON_INTERPRET"):
        linear_logprob(hidden, weight, targets, backend="fused")


def test_scratch(monkeypatch):
    """Log-probs alone: partial sums only. With gradients: E′ of one chunk, and no float32 logits."""
    monkeypatch.undo()
    vocabulary, itemsize = 152_064, 2
    head = Head(
        torch.empty(10**6, 8, dtype=torch.bfloat16, device="meta"),
        torch.empty(vocabulary, 8, dtype=torch.bfloat16, device="meta"),
        torch.empty(10**6, dtype=torch.int64, device="meta"),
        None,
        1.0,
        None,
        1.0,
    )
    for needs in (Needs(), Needs(hidden=True), Needs(hidden=True, weight=True)):
        steps = _fused_head._FusedSteps(head, needs)
        assert steps.logits.numel() == 0
        assert steps.stored.numel() == (4096 * vocabulary if needs else 0)
        assert steps.partial.nbytes <= steps.rows * vocabulary * itemsize / 32
