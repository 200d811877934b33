"""linear_logprob, torch backend, against the float64 reference: values and every gradient."""
# pyright: reportCallIssue=false, reportArgumentType=false
# (unpacked leaves and options: the checker cannot count or tell them apart)

import pytest
import torch
from grpo_kernels import linear_logprob, reference
from kernel_cases import H, N, V, assert_close, error, exact, named, small_chunks, tensors

BACKENDS = ("torch",)  # the triton backend has its own tests: the interpreter is slow
SHAPES_OF_LOGITS = [
    {},
    {"temperature": 0.7, "logit_scale": 0.3},
    {"softcap": 3.0},
    {"bias": True},
    {"bias": True, "softcap": 2.0, "temperature": 1.3},
]


def _loss(which, logprobs, entropy):
    """A different weight for each token, of the log-probs, of the entropy or of both."""
    weights = torch.linspace(-1.0, 1.0, len(logprobs), dtype=logprobs.dtype)
    parts = {"logprobs": logprobs @ weights, "entropy": entropy @ weights.flip(0)}
    return sum(parts.values()) if which == "both" else parts[which]


@pytest.mark.parametrize("which", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SHAPES_OF_LOGITS, ids=str)
def test_values_and_gradients(backend, options, which):
    options = dict(options)
    leaves, targets = tensors(dtype=torch.float32, bias=options.pop("bias", False))
    true_leaves = exact(leaves)
    with small_chunks(backend):
        found = linear_logprob(*leaves[:2], targets, backend=backend, **named(leaves), **options)
        gradients = torch.autograd.grad(_loss(which, *found), leaves)
    true = reference.linear_logprob(*true_leaves[:2], targets, **named(true_leaves), **options)
    assert [result.dtype for result in found] == [torch.float32] * 2
    assert_close(found, true, 3e-6)
    assert_close(gradients, torch.autograd.grad(_loss(which, *true), true_leaves), 3e-5)


@pytest.mark.parametrize(
    "trained", [(True, False), (False, True), (True, True)], ids=["hidden", "weight", "both"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend, trained):
    leaves, targets = tensors(dtype=torch.float32)
    for leaf, wanted in zip(leaves, trained, strict=True):
        leaf.requires_grad_(wanted)
    linear_logprob(*leaves, targets, backend=backend)[0].sum().backward()
    true_leaves = exact(leaves)
    reference.linear_logprob(*true_leaves, targets)[0].sum().backward()
    for leaf, true, wanted in zip(leaves, true_leaves, trained, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None and true.grad is not None:
            assert error(leaf.grad, true.grad) < 3e-5


@pytest.mark.parametrize("options", SHAPES_OF_LOGITS, ids=str)
def test_gradcheck(options):
    options = dict(options)
    leaves, targets = tensors(5, 3, 11, dtype=torch.float64, bias=options.pop("bias", False))
    with small_chunks("torch", rows=2, v=11):

        def op(*inputs):
            return linear_logprob(*inputs[:2], targets, backend="torch", **named(list(inputs)), **options)

        assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("n,h,v", [(1, 1, 2), (1, 16, 1), (3, 5, 257), (0, 4, 9), (65, 7, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_shapes(backend, n, h, v):
    leaves, targets = tensors(n, h, v, dtype=torch.float32)
    true_leaves = exact(leaves)
    found = linear_logprob(*leaves, targets.to(torch.int32), backend=backend)
    true = reference.linear_logprob(*true_leaves, targets)
    assert_close(found, true, 1e-5)
    gradients = torch.autograd.grad(sum(part.sum() for part in found), leaves)
    expected = torch.autograd.grad(sum(part.sum() for part in true), true_leaves)
    for a, b in zip(gradients, expected, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5, rtol=1e-4)


def _adversarial(name):
    leaves, targets = tensors(8, H, V, dtype=torch.float32)
    hidden, weight = (leaf.detach().clone() for leaf in leaves)
    bias = torch.zeros(V)
    if name == "target least likely":
        weight[targets] = -4.0 * hidden
    elif name == "logits of ±1e4":
        weight *= 1e4 / (hidden @ weight.t()).abs().max()
    elif name == "all logits equal":
        weight[:] = weight[0]
    elif name == "zero":
        hidden.zero_()
    elif name == "masked by -inf":
        bias[::3] = -torch.inf
        targets = targets.clamp(max=V - 2) // 3 * 3 + 1
    elif name == "peaked far below zero":
        bias[:] = -1e3
        bias[targets[0]] = -900.0
    elif name == "nearly certain":
        bias[targets[3]] = 60.0
        targets[:] = targets[3]
    elif name == "identical rows":
        hidden[:] = hidden[0]
        targets[:] = targets[0]
    return [hidden.requires_grad_(), weight.requires_grad_()], targets, bias


@pytest.mark.parametrize(
    "name",
    [
        "target least likely",
        "logits of ±1e4",
        "all logits equal",
        "zero",
        "masked by -inf",
        "peaked far below zero",
        "nearly certain",
        "identical rows",
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_rows(backend, name):
    """Finite wherever float64 is, and as close as float32 logits of that size allow."""
    leaves, targets, bias = _adversarial(name)
    true_leaves = exact(leaves)
    with small_chunks(backend):
        found = linear_logprob(*leaves, targets, bias=bias, backend=backend)
        gradients = [torch.autograd.grad(part.sum(), leaves, retain_graph=True) for part in found]
    true = reference.linear_logprob(*true_leaves, targets, bias=bias.double())
    largest = (true_leaves[0] @ true_leaves[1].t() + bias.clamp(min=-1e3)).abs().max().item()
    for a, b in zip(found, true, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-6 * max(1.0, largest), rtol=1e-6), name
    for which, expected in enumerate(true):
        wanted = torch.autograd.grad(expected.sum(), true_leaves, retain_graph=True)
        for a, b in zip(gradients[which], wanted, strict=True):
            tolerance = 1e-5 * max(1.0, largest / 10) * max(1.0, float(b.abs().max()))
            assert torch.allclose(a.double(), b, atol=tolerance), (name, which)


def test_full_precision_where_the_target_is_nearly_certain():
    leaves, targets, bias = _adversarial("nearly certain")
    hidden, weight = exact(leaves)
    logits = hidden @ weight.t() + bias
    # log_softmax rounds to 0 here even in float64
    exponents = logits - logits.gather(1, targets.unsqueeze(1))
    true = -torch.log1p(exponents.scatter(1, targets.unsqueeze(1), -torch.inf).exp().sum(1))
    for backend in BACKENDS:
        found = linear_logprob(*leaves, targets, bias=bias, backend=backend)[0]
        assert torch.allclose(found.double(), true, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_is_no_worse_than_eager(backend):
    """Truth is float64 on the same float16 inputs; the yardstick is the reference run in float16."""
    leaves, targets = tensors(dtype=torch.float16, spread=0.3)
    true_leaves = exact(leaves)
    weights = torch.linspace(-1.0, 1.0, N)

    def run(function, inputs, **options):
        outputs = function(*inputs, targets, **options)
        loss = (outputs[0] * weights.to(outputs[0].dtype)).sum()
        return [*outputs, *torch.autograd.grad(loss, inputs)]

    true = run(reference.linear_logprob, true_leaves)
    eager = run(reference.linear_logprob, leaves)
    with small_chunks(backend):
        found = run(linear_logprob, leaves, backend=backend)
    assert [part.dtype for part in found] == [torch.float32] * 2 + [torch.float16] * 2
    for ours, theirs, exactly in zip(found, eager, true, strict=True):
        assert error(ours, exactly) <= error(theirs, exactly) + 1e-3
    assert error(found[0], true[0]) < 3e-6


def test_bfloat16_head_on_the_cpu():
    leaves, targets = tensors(dtype=torch.bfloat16, spread=0.3)
    true_leaves = exact(leaves)
    found = linear_logprob(*leaves, targets)
    true = reference.linear_logprob(*true_leaves, targets)
    assert_close(found, true, 3e-6)
    gradients = torch.autograd.grad(found[0].sum(), leaves)
    assert gradients[1].dtype == torch.bfloat16
    assert_close(gradients, torch.autograd.grad(true[0].sum(), true_leaves), 5e-3)


def test_strided_inputs():
    _, targets = tensors(dtype=torch.float32)
    wide = torch.randn(H, N).t()  # rows not contiguous
    weight = torch.randn(H, V).t()
    true = reference.linear_logprob(wide.double(), weight.double(), targets)
    for backend in BACKENDS:
        assert_close(linear_logprob(wide, weight, targets, backend=backend), true, 3e-6)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"targets": torch.zeros(N - 1, dtype=torch.long)},
            r"targets must have shape \(N,\) = \(37,\), got \(36,\)",
        ),
        ({"targets": torch.zeros(N)}, "targets must be int32 or int64"),
        ({"targets": torch.full((N,), V)}, r"targets must lie in \[0, V\) = \[0, 301\), got 301"),
        ({"weight": torch.zeros(V, H + 1)}, r"weight must have shape"),
        ({"weight": torch.zeros(V, H).half()}, "weight must have the dtype of hidden"),
        ({"hidden": torch.zeros(2, N, H)}, r"hidden must have shape \(N, H\)"),
        ({"bias": torch.zeros(V + 1)}, "bias must have shape"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"backend": "fast"}, "backend must be one of auto, torch, triton, fused; got 'fast'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(change, message):
    leaves, targets = tensors(dtype=torch.float32)
    arguments = {"hidden": leaves[0], "weight": leaves[1], "targets": targets} | change
    with pytest.raises((ValueError, TypeError), match=message):
        linear_logprob(**arguments)


def test_float64_is_refused_by_triton():
    leaves, targets = tensors(dtype=torch.float64)
    with pytest.raises(ValueError, match="does not take float64"):
        linear_logprob(*leaves, targets, backend="triton")


def test_auto_announces_its_choice_once(caplog):
    import grpo_kernels._head as head

    head._announced.clear()
    leaves, targets = tensors(dtype=torch.float32)
    with caplog.at_level("INFO", logger="grpo_kernels"):
        for _ in range(2):
            linear_logprob(*leaves, targets)
    assert [record.getMessage() for record in caplog.records] == ["kernels on cpu: backend torch"]
