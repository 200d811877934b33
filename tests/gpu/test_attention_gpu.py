"""Packed attention and the engine on a CUDA device: every back end found there against float64."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_fast.attention.backends import SLOW, TABLE, Backend, Case, choose, fault
from grpo_fast.attention.function import attention, use_packed_attention
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from tests.attention_cases import truth
from tests.families import packed_logprobs, ragged, single_logprobs, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "query_pre_attn_scalar": 64}
FAMILY_NAMES = ["qwen2", "qwen3", "llama", "mistral", "gemma2"]
PACKED_NAMES = [*FAMILY_NAMES, "gpt_oss"]


def grouped_plan(long: bool) -> PackedPlan:
    """Prompts with completions that attend to them: cu_q != cu_k, of odd lengths."""
    rng = random.Random(0)
    lengths, starts, shared, at = [], [], [], 0
    for _ in range(3):
        prompt = rng.randint(100, 700) if long else rng.randint(3, 20)
        first = at
        lengths.append(prompt)
        starts.append(0)
        shared.append(0)
        at += prompt
        for _ in range(5):
            size = rng.randint(1, 500) if long else rng.randint(1, 40)
            lengths.append(size)
            starts.append(first)
            shared.append(prompt)
            at += size
    return PackedPlan(tuple(lengths), tuple(starts), tuple(shared), torch.device("cuda"))


def case(
    plan: PackedPlan, heads: tuple[int, int], dim: int, sinks: bool, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values, perhaps sinks, and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(plan.length, h, dim) for h in (*heads, heads[1], heads[0])] + [(heads[0],)] * sinks
    q, k, v, grad, *rest = (
        torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes
    )
    return [q, k, v, *rest], grad


def run(
    backend: Backend, inputs: list[Tensor], grad: Tensor, plan: PackedPlan, window, softcap
) -> list[Tensor]:
    values = [x.detach().clone().requires_grad_() for x in inputs]
    sinks = values[3] if len(values) > 3 else None
    out = backend.run(*values[:3], plan, scale=0.2, window=window, softcap=softcap, sinks=sinks)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in values if x.grad is not None)]


def usable(
    backend: Backend, dtype: torch.dtype, heads: tuple[int, int], dim: int, window, softcap, sinks: bool
) -> None:
    """Skip where the back end says that it cannot, or is not installed."""
    wanted = Case(torch.device("cuda", 0), dtype, *heads, dim, dim, window is not None, softcap, sinks)
    if why := backend.lacks(wanted):
        pytest.skip(f"{backend.name} {why}")
    if (why := fault(backend, wanted)) and backend.choice == "flash":
        pytest.skip(f"{backend.name} {why}")  # the trainer would not use it either


NAMES = {backend.name: backend for backend in TABLE if "cuda" in backend.devices}
TERMS = [
    (None, None, False),
    (7, None, False),
    (200, None, False),
    (None, 5.0, False),
    (7, 5.0, False),
    (None, None, True),
    (7, None, True),
]


def check(
    backend: Backend, plan: PackedPlan, heads: tuple[int, int], dim: int, window, softcap, sinks: bool
) -> None:
    inputs, grad = case(plan, heads, dim, sinks, torch.bfloat16)
    want = truth(inputs, grad, plan, window, softcap, sinks, scale=0.2)
    got = run(backend, inputs, grad, plan, window, softcap)
    for part, g, w in zip(("out", "dq", "dk", "dv", "dsinks"), got, want, strict=False):
        assert g.dtype == torch.bfloat16
        assert error(g, w) < 0.012, (backend.name, part, error(g, w))


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize(("window", "softcap", "sinks"), TERMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_back_end_against_float64(
    name: str, window, softcap, sinks: bool, heads: tuple[int, int], long: bool
) -> None:
    """Prompts shared by ragged completions, in bfloat16, may differ by its rounding only."""
    usable(NAMES[name], torch.bfloat16, heads, 64, window, softcap, sinks)
    check(NAMES[name], grouped_plan(long), heads, 64, window, softcap, sinks)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_few_queries_see_the_whole_of_a_long_prompt(name: str, dim: int) -> None:
    """Queries fewer than keys: the causal mask must be aligned at the bottom right, also across kernel blocks."""
    usable(NAMES[name], torch.bfloat16, (4, 2), dim, None, None, False)
    plan = PackedPlan((513, 1, 2, 130, 64), (0, 0, 0, 0, 0), (0, 513, 513, 513, 0), torch.device("cuda"))
    check(NAMES[name], plan, (4, 2), dim, None, None, False)


@pytest.mark.parametrize(("window", "softcap", "sinks"), TERMS)
def test_a_fused_kernel_is_chosen(window, softcap, sinks: bool) -> None:
    """Should a release change what a kernel computes, this says so; the trainer itself falls back."""
    plan = grouped_plan(True)
    wanted = Case(torch.device("cuda", 0), torch.bfloat16, 8, 2, 64, 64, window is not None, softcap, sinks)
    found = choose(wanted, plan)
    assert found.choice not in SLOW, {b.name: b.lacks(wanted) or fault(b, wanted) for b in TABLE}


def test_a_kernel_that_is_first_tried_inside_a_checkpointed_layer() -> None:
    """The trial of a back end must not count among what the layer saves, or the backward pass ends the run."""
    plan = grouped_plan(True)
    [q, k, v], _ = case(plan, (8, 2), 64, False, torch.bfloat16)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, L, D)
    q.requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return attention(torch.nn.Module(), x, k, v, None, scaling=0.2, plan=plan)[0]

    fault.cache_clear()
    (got,) = torch.autograd.grad(checkpoint(layer, q, use_reentrant=False).float().sum(), q)
    (want,) = torch.autograd.grad(layer(q).float().sum(), q)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [None, 7])
def test_float32_has_a_way_too(window) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    plan = grouped_plan(True)
    wanted = Case(torch.device("cuda", 0), torch.float32, 8, 2, 64, 64, window is not None, None, False)
    inputs, grad = case(plan, (8, 2), 64, False, torch.float32)
    got = run(choose(wanted, plan), inputs, grad, plan, window, None)
    for g, w in zip(got, truth(inputs, grad, plan, window, None, False, scale=0.2), strict=True):
        assert error(g, w) < 1e-4


@pytest.mark.parametrize("family", PACKED_NAMES)
def test_float32_packed_equals_one_by_one(family: str) -> None:
    """The padded path on the GPU is as exact as on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = tiny_model(family).cuda()
    model = use_packed_attention(copy.deepcopy(reference))
    want = single_logprobs(reference, *ragged())
    got = packed_logprobs(model, *ragged(), token_budget=120)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bfloat16_packed_is_as_good_as_one_by_one(family: str) -> None:
    """Against the float32 model, packed bf16 may err no more than transformers' own bf16, plus a little."""
    changes = WIDE if family == "gemma2" else {k: v for k, v in WIDE.items() if k != "query_pre_attn_scalar"}
    exact = tiny_model(family, **changes).cuda()
    with torch.no_grad():
        for parameter in exact.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2)
    reference = copy.deepcopy(exact).bfloat16()
    model = use_packed_attention(copy.deepcopy(reference))
    with torch.no_grad():
        truth = torch.cat(single_logprobs(exact, *ragged(groups=6)))
        theirs = torch.cat(single_logprobs(reference, *ragged(groups=6)))
    ours = torch.cat(packed_logprobs(model, *ragged(groups=6), token_budget=300))
    assert (ours - truth).abs().mean() < 1.2 * (theirs - truth).abs().mean() + 1e-3
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_engine_in_float32(family: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(family).cuda()
    prompts = ragged(groups=5)[0]
    sampling = Sampling(max_new_tokens=30, stop_token_ids=(3, 4, 5))
    completions = LocalEngine(model, max_rows=7).generate(prompts, 3, sampling, seed=1)
    tokens = [c.token_ids for c in completions]
    owner = [p for p in range(5) for _ in range(3)]
    with torch.no_grad():
        want = packed_logprobs(model, prompts, tokens, owner, token_budget=150)
    for completion, expected in zip(completions, want, strict=True):
        torch.testing.assert_close(completion.logprobs, expected.cpu(), atol=5e-4, rtol=0)


def test_engine_in_bfloat16() -> None:
    """Cached decoding and the packed forward round differently, but not by more than bf16 does."""
    model = (
        tiny_model("qwen2", **{k: v for k, v in WIDE.items() if k != "query_pre_attn_scalar"})
        .cuda()
        .bfloat16()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2)
    prompts = ragged(groups=5)[0]
    completions = LocalEngine(model).generate(prompts, 4, Sampling(max_new_tokens=40), seed=0)
    tokens = [c.token_ids for c in completions]
    owner = [p for p in range(5) for _ in range(4)]
    with torch.no_grad():
        want = packed_logprobs(model, prompts, tokens, owner, token_budget=400)
    gaps = torch.cat([(c.logprobs - w.cpu()).abs() for c, w in zip(completions, want, strict=True)])
    assert gaps.mean() < 0.05 and gaps.max() < 0.5
