"""Packed attention and the engine on a CUDA device: the fused path against exact arithmetic."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

from grpo_fast.attention import paths
from grpo_fast.attention.function import _varlen_works, use_packed_attention
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from tests.families import packed_logprobs, ragged, single_logprobs, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "query_pre_attn_scalar": 64}
FAMILY_NAMES = ["qwen2", "qwen3", "llama", "mistral", "gemma2"]


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


def run(path, values: list[Tensor], grad: Tensor, plan: PackedPlan, **options) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in values]
    out = path(*inputs, plan, **options)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


def error(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 5.0), (7, 5.0)])
def test_every_path_against_float32(window, softcap, heads: tuple[int, int], long: bool) -> None:
    """Rectangles in float32 are the truth; every other path may differ by bf16 rounding only."""
    plan = grouped_plan(long)
    torch.manual_seed(0)
    values = [
        torch.randn(plan.length, h, 64, device="cuda", dtype=torch.bfloat16) for h in (*heads, heads[1])
    ]
    grad = torch.randn(plan.length, heads[0], 64, device="cuda")
    common = {"scale": 0.2, "window": window}
    want = run(paths.padded, [x.float() for x in values], grad, plan, softcap=softcap, **common)
    results = {"padded": run(paths.padded, values, grad, plan, softcap=softcap, **common)}
    if softcap is None:
        results["segment"] = run(paths.by_segment, values, grad, plan, **common)
    for package in paths.varlen_packages(window=window, softcap=softcap):
        results[package] = run(paths.varlen, values, grad, plan, softcap=softcap, package=package, **common)
    for name, got in results.items():
        for part, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            assert error(g, w) < 0.012, (name, part, error(g, w))


def test_torch_varlen_passes_its_probe() -> None:
    """Should a release change what the kernel computes, this says so; the trainer itself falls back."""
    if "torch" not in paths.varlen_packages(window=None, softcap=None):
        pytest.skip("this torch has no varlen_attn")
    shapes = (torch.Size((8, 64)), torch.Size((2, 64)), torch.Size((2, 64)))
    assert _varlen_works(torch.device("cuda", 0), "torch", torch.bfloat16, *shapes, False, None)


@pytest.mark.parametrize("family", FAMILY_NAMES)
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
