"""The engine on a CUDA device: paged kernel against float64, graphs against eager steps, weights trained in place."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from grpo_fast.attention.paged import FP8, _kernel_works
from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.models.lora import LoraSettings, add_lora
from tests.families import packed_logprobs, ragged, single_logprobs, tiny_model
from tests.paged_cases import exact, random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILY_NAMES = ["qwen2", "qwen3", "llama", "mistral", "gemma2"]
PROMPTS = [prompt * 6 for prompt in ragged(groups=6)[0]]
SAMPLING = Sampling(max_new_tokens=90, stop_token_ids=(3,))
OFF, ON = EngineSettings(cuda_graphs="off"), EngineSettings(cuda_graphs="on")
# Qwen2.5 7B and 0.5B, Gemma's width, a single key head
SHAPES = [(28, 4, 128), (14, 2, 64), (16, 8, 256), (8, 1, 96)]


def texts(completions: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in completions]


def cuda_model(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A tiny model whose heads are 64 wide."""
    wide = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    if family == "gemma2":
        wide["query_pre_attn_scalar"] = 64
    model = tiny_model(family, **wide, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2)
    return model.to("cuda", dtype).eval()


def needs_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 conversion before compute capability 8.9")


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (70, None), (None, 5.0), (140, 5.0)])
def test_paged_kernel(window, softcap, shape: tuple[int, int, int], kind: str) -> None:
    from grpo_fast.attention.paged_kernel import paged_attention_triton

    if kind == "fp8":
        needs_fp8()
    dtype = torch.bfloat16 if kind == "fp8" else getattr(torch, kind)
    q, pages = random_case(*shape, dtype, fp8=kind == "fp8", device="cuda")
    options: dict[str, Any] = {"scale": shape[2] ** -0.5, "window": window, "softcap": softcap}
    want = exact(q, pages, **options)
    for parts in (1, 2, 8, None):
        got = paged_attention_triton(q, pages, parts=parts, **options).double()
        error = ((got - want).norm() / want.norm()).item()
        assert error < {"float32": 1e-5, "float16": 1e-3}.get(kind, 6e-3), (parts, error)
    stored = FP8 if kind == "fp8" else dtype
    probed = (*shape[:2], shape[2], shape[2])
    assert _kernel_works(q.device, dtype, stored, probed, window is not None, softcap)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_float32_greedy_is_generate(family: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = cuda_model(family, torch.float32)
    engine = LocalEngine(copy.deepcopy(reference), max_rows=4)
    completions = engine.generate(PROMPTS, 1, Sampling(temperature=0, max_new_tokens=40), seed=0)
    assert engine._graphs is not None and engine._graphs.usable
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        want = reference.generate(ids, **options)[0, len(prompt) :].tolist()
        got = completion.token_ids
        split = next((i for i in range(40) if got[i] != want[i]), None)
        if split is not None:  # only where the two best are as good as tied
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + got[:split]], device="cuda")).logits[0, -1]
            assert (logits[want[split]] - logits[got[split]]).abs() < 1e-3


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bfloat16_logprobs_are_as_good_as_transformers(family: str) -> None:
    """Teacher forcing in float32 is the truth; the engine may err little more than transformers' own bfloat16."""
    exact_model = cuda_model(family, torch.float32)
    model = copy.deepcopy(exact_model).bfloat16()
    reference = copy.deepcopy(model)
    completions = LocalEngine(model, max_rows=16).generate(PROMPTS, 4, SAMPLING, seed=1)
    owner = [p for p in range(len(PROMPTS)) for _ in range(4)]
    with torch.no_grad():
        truth = torch.cat(single_logprobs(exact_model, PROMPTS, texts(completions), owner)).cpu()
        theirs = torch.cat(single_logprobs(reference, PROMPTS, texts(completions), owner)).cpu()
    ours = torch.cat([c.logprobs for c in completions])
    assert (ours - truth).abs().mean() < 1.2 * (theirs - truth).abs().mean() + 1e-3


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("truncation", [{}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.8, "min_p": 0.01}])
def test_graphs_change_nothing(family: str, truncation: dict, caplog: pytest.LogCaptureFixture) -> None:
    model = cuda_model(family)
    sampling = Sampling(max_new_tokens=90, stop_token_ids=(3,), **truncation)
    # one number of rows throughout: with others, libraries choose other products and rounding differs
    want = LocalEngine(model, settings=OFF).generate(PROMPTS, 4, sampling, seed=3)
    engine = LocalEngine(model, settings=ON)
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        got = engine.generate(PROMPTS, 4, sampling, seed=3)
    assert not caplog.records
    assert engine._graphs is not None and engine._graphs.usable and engine._graphs.replays
    compared = 0
    for g, w in zip(got, want, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(g.token_ids, w.token_ids, strict=False)) if a != b), None
        )
        same = min(len(g.token_ids), len(w.token_ids)) if same is None else same
        torch.testing.assert_close(g.logprobs[:same], w.logprobs[:same], atol=0.05, rtol=0)
        compared += same
    assert compared > 0.7 * sum(len(c.token_ids) for c in want)


@pytest.mark.parametrize("lora", [False, True])
def test_graphs_follow_weights_that_are_trained_in_place(lora: bool) -> None:
    model = cuda_model("qwen2", torch.float32)
    if lora:
        add_lora(model, LoraSettings(rank=4))
    engine = LocalEngine(model, settings=ON)
    before = engine.generate(PROMPTS, 2, SAMPLING, seed=0)
    kept = dict(engine._graphs.replays) if engine._graphs is not None else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or not lora:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    after = engine.generate(PROMPTS, 2, SAMPLING, seed=0)
    assert engine._graphs is not None and all(engine._graphs.replays[key] is kept[key] for key in kept)
    assert texts(after) != texts(before)
    owner = [p for p in range(len(PROMPTS)) for _ in range(2)]
    with torch.no_grad():
        want = packed_logprobs(model, PROMPTS, texts(after), owner, token_budget=2000)
    for completion, expected in zip(after, want, strict=True):
        torch.testing.assert_close(completion.logprobs, expected.cpu(), atol=2e-3, rtol=0)


def test_few_rows_with_refill_and_stop_strings() -> None:
    model = cuda_model("qwen2", torch.float32)

    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in ids)

    free = LocalEngine(model, settings=OFF, decode=decode)
    stopped = LocalEngine(model, max_rows=5, settings=ON, decode=decode)
    strings = ("ab", "xyz", "q")
    whole = free.generate(PROMPTS, 4, Sampling(max_new_tokens=60), seed=9)
    got = stopped.generate(PROMPTS, 4, Sampling(max_new_tokens=60, stop_strings=strings), seed=9)
    equal = 0
    for g, w in zip(got, whole, strict=True):
        assert (g.finish_reason == "stop") == any(s in decode(g.token_ids) for s in strings)
        assert not any(s in decode(g.token_ids[:-1]) for s in strings)
        equal += g.token_ids == w.token_ids[: len(g.token_ids)]
    assert equal > 0.8 * len(whole)  # float32 products of other sizes round otherwise now and then


def test_sleep_gives_the_memory_back() -> None:
    model = cuda_model("qwen2")
    engine = LocalEngine(model, settings=ON)
    first = engine.generate(PROMPTS, 4, SAMPLING, seed=0)
    held, allocated = engine.memory(), torch.cuda.memory_allocated()
    assert held > 0
    engine.sleep()
    assert allocated - torch.cuda.memory_allocated() >= held and engine.memory() == 0
    engine.wake()
    assert texts(engine.generate(PROMPTS, 4, SAMPLING, seed=0)) == texts(first)


def test_eight_bit_keys() -> None:
    needs_fp8()
    model = cuda_model("qwen2")
    full, small = LocalEngine(model), LocalEngine(model, settings=EngineSettings(kv_dtype="fp8"))
    full.generate(PROMPTS, 4, SAMPLING, seed=0)
    completions = small.generate(PROMPTS, 4, SAMPLING, seed=0)
    assert small.memory() / full.memory() == pytest.approx((64 + 4) / 128)
    owner = [p for p in range(len(PROMPTS)) for _ in range(4)]
    with torch.no_grad():
        trainer = torch.cat(packed_logprobs(model, PROMPTS, texts(completions), owner, token_budget=2000))
    difference = (trainer.cpu() - torch.cat([c.logprobs for c in completions])).abs()
    assert 0 < difference.mean() < 0.05
