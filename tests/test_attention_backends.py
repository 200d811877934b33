"""Every way to compute packed attention against a masked softmax in float64, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from torch.utils.checkpoint import checkpoint

from grpo_fast.attention import backends, fused, paths
from grpo_fast.attention.backends import CHOICES, REFERENCE, TABLE, Case, check_choice, choose, use
from grpo_fast.attention.flex import BLOCK, block_mask, bucket, flex, visibility
from grpo_fast.attention.function import attention
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.attention.tiles import tiled
from grpo_fast.errors import UserError
from tests.attention_cases import seen, truth

HEADS, KEY_HEADS, DIM = 4, 2, 16
# prompts alone, completions of one token and of many, a prompt shared from afar, longer than a tile's rows
PLANS = {
    "short": PackedPlan((5, 3, 1, 30, 7), (0, 0, 0, 0, 9), (0, 5, 5, 0, 30)),
    "long": PackedPlan((300, 20, 280, 1, 6, 290), (0, 0, 0, 0, 0, 601), (0, 300, 300, 300, 0, 6)),
}
CPU = Case(torch.device("cpu"), torch.float32, HEADS, KEY_HEADS, DIM, DIM, False, None, False)


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    yield
    use("auto")


def run(path, inputs: list[Tensor], grad: Tensor, plan: PackedPlan, window, softcap=None) -> list[Tensor]:
    values = [x.detach().clone().requires_grad_() for x in inputs]
    sinks = values[3] if len(values) > 3 else None
    out = path(*values[:3], plan, scale=0.4, window=window, softcap=softcap, sinks=sinks)
    return [out.detach(), *torch.autograd.grad(out, values, grad)]


def case(plan: PackedPlan, sinks: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(plan.length, heads, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)] + [(HEADS,)] * sinks
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return inputs, torch.randn(plan.length, HEADS, DIM, generator=generator)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 37, 290, 400])
@pytest.mark.parametrize("name", PLANS)
def test_every_path_against_float64(name: str, window: int | None, sinks: bool) -> None:
    plan = PLANS[name]
    inputs, grad = case(plan, sinks)
    want = truth(inputs, grad, plan, window, None, sinks)
    for path in (paths.padded, paths.by_segment, tiled):
        for g, w in zip(run(path, inputs, grad, plan, window), want, strict=True):
            torch.testing.assert_close(g.double(), w, atol=2e-5, rtol=1e-4, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", PLANS)
def test_softcap_against_float64(name: str, window: int | None, sinks: bool) -> None:
    plan = PLANS[name]
    inputs, grad = case(plan, sinks)
    want = truth(inputs, grad, plan, window, 2.0, sinks)
    for path in (paths.padded, paths.by_segment):
        for g, w in zip(run(path, inputs, grad, plan, window, 2.0), want, strict=True):
            torch.testing.assert_close(g.double(), w, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sinks", [False, True])
def test_bfloat16_is_near_the_truth(sinks: bool) -> None:
    plan = PLANS["long"]
    inputs, grad = case(plan, sinks)
    inputs, grad = [x.bfloat16() for x in inputs], grad.bfloat16()
    want = truth(inputs, grad, plan, None, None, sinks)
    for path in (paths.padded, tiled):
        for g, w in zip(run(path, inputs, grad, plan, None), want, strict=True):
            assert g.dtype == torch.bfloat16
            assert ((g.double() - w).norm() / w.norm()).item() < 8e-3


@pytest.mark.parametrize("window", [None, 4, 150])
@pytest.mark.parametrize("name", PLANS)
def test_the_block_mask_is_the_plan(name: str, window: int | None) -> None:
    """FlexAttention on the CPU has no backward pass: its mask, its blocks and its forward pass are checked."""
    plan = PLANS[name]
    length = bucket(plan.length)
    assert length >= plan.length and length % BLOCK == 0
    dense = create_mask(visibility(plan, window, length), None, None, length, length, device="cpu")[0, 0]
    assert torch.equal(dense[: plan.length, : plan.length], seen(plan, window))
    assert not dense[plan.length :, : plan.length].any() and dense.any(1).all()
    mask = block_mask(plan, window, length)
    blocks = dense.view(length // BLOCK, BLOCK, -1, BLOCK).permute(0, 2, 1, 3)
    some, whole = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    listed = [torch.zeros_like(some), torch.zeros_like(some)]
    pairs = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for table, (counts, indices) in zip(listed, pairs, strict=True):
        assert counts is not None and indices is not None
        for row, count in enumerate(counts[0, 0].tolist()):
            table[row, indices[0, 0, row, :count].long()] = True
    assert not (listed[0] & listed[1]).any()
    assert (listed[0] | listed[1])[some].all(), "a block with something to see was left out"
    assert whole[listed[1]].all(), "a block that is not wholly visible was taken as such"
    if name == "long" and window is None:
        assert listed[1].any()
    for softcap, sinks in ((None, False), (2.0, False), (None, True)):
        inputs, _ = case(plan, sinks)
        with torch.no_grad():
            options: dict[str, Any] = {"scale": 0.4, "window": window, "softcap": softcap}
            options["sinks"] = inputs[3] if sinks else None
            q, k, v = inputs[:3]
            got, want = (path(q, k, v, plan, **options) for path in (flex, paths.padded))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_few_lengths_are_compiled_for() -> None:
    assert len({bucket(length) for length in range(1, 65_537)}) < 60
    assert all(bucket(length) < max(1.13 * length, length + BLOCK) for length in range(1, 65_537, 37))


def test_gathered_keys_add_up_in_float32() -> None:
    plan = PackedPlan((2,) + (1,) * 300, (0,) * 301, (0,) + (2,) * 300)
    k = torch.ones(plan.length, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    gathered, _ = fused.gathered_keys(k, k, plan)
    gathered.sum().backward()
    assert k.grad is not None and k.grad.dtype == torch.bfloat16
    assert k.grad[:2].eq(301).logical_or(k.grad[:2].eq(300)).logical_or(k.grad[:2].eq(302)).all()


def test_a_prompt_is_one_rectangle_for_its_whole_group() -> None:
    plan = PackedPlan((40, 30, 20, 10), (0, 0, 0, 0), (0, 40, 40, 40))
    assert next(t for t in plan.tiles(None) if t.keys == (0, 40) and not t.causal).queries == (40, 100)
    seen_pairs = sum((t.queries[1] - t.queries[0]) * (t.keys[1] - t.keys[0]) for t in plan.tiles(None))
    assert seen_pairs == 40 * 60 + 40**2 + 30**2 + 20**2 + 10**2


# The choice


def test_the_fastest_that_fits_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    backends._say.cache_clear()
    with caplog.at_level(logging.INFO, "grpo_fast.attention.backends"):
        assert choose(CPU, PLANS["short"]) is REFERENCE  # few keys: rectangles in one product
        for _ in range(3):
            assert choose(CPU, PLANS["long"]).run is tiled
    said = [r.getMessage() for r in caplog.records]
    assert said.count("attention: merged SDPA tiles for float32 on cpu") == 1
    assert choose(CPU._replace(softcap=5.0), PLANS["long"]) is REFERENCE
    assert choose(CPU._replace(value_dim=8), PLANS["long"]) is REFERENCE
    assert choose(CPU._replace(value_dim=8), PackedPlan.of_lengths([1500])).run is paths.by_segment


def test_a_back_end_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def top_left(q, k, v, plan, **options):  # the wrong alignment: completions blind to their prompt
        apart = replace(plan, prefix_lens=(0,) * len(plan.q_lens), _chunks={}, _tiles={}, block_masks={})
        return paths.padded(q, k, v, apart, **options)

    def broken(*args, **options):
        raise RuntimeError("no kernel image is available")

    wrong, dead = (replace(REFERENCE, name=f.__name__, run=f) for f in (top_left, broken))
    monkeypatch.setattr(backends, "TABLE", (wrong, dead, REFERENCE))
    with caplog.at_level(logging.INFO, "grpo_fast.attention.backends"):
        assert choose(CPU, PLANS["short"]) is REFERENCE
    text = caplog.text
    assert "top_left differs from the reference" in text and "broken is not usable" in text


@pytest.mark.parametrize(
    ("choice", "changes", "message"),
    [
        ("flash", {}, "flash-attn 2 does not run on cpu"),
        ("flex", {}, "FlexAttention does not run on cpu"),
        ("sdpa", {"softcap": 3.0}, "merged SDPA tiles has no softcap"),
    ],
)
def test_a_forced_back_end_that_cannot_is_refused(choice: str, changes: dict, message: str) -> None:
    use(choice)
    with pytest.raises(UserError, match=rf"policy.attention = {choice}: .*{message}.*; use auto"):
        choose(CPU._replace(**changes), PLANS["short"])


def test_a_forced_back_end_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = PLANS["short"], []
    q, k, v = (torch.randn(1, heads, plan.length, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    results = []
    for choice in ("auto", "sdpa", "reference"):
        use(choice)
        calls.append(choose(CPU, plan).run)
        results.append(attention(torch.nn.Module(), q, k, v, None, scaling=0.4, plan=plan)[0])
    assert calls == [paths.padded, tiled, paths.padded]
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="auto, flash, torch, flex, sdpa, reference"):
        use("fast")


def test_choices_are_checked_before_a_model_is_loaded() -> None:
    cpu = torch.device("cpu")
    for choice in ("auto", "sdpa", "reference"):
        check_choice(choice, cpu)
    for choice in ("flash", "torch", "flex"):
        with pytest.raises(UserError, match=f"policy.attention = {choice}: .*needs cuda; use auto"):
            check_choice(choice, cpu)
    assert set(CHOICES) == {"auto", *(backend.choice for backend in TABLE)}


def test_a_back_end_that_is_first_tried_inside_a_checkpointed_layer() -> None:
    """What the trial saves for its own backward pass is not counted among what the layer saves."""
    plan = PLANS["long"]
    q, k, v = (torch.randn(1, heads, plan.length, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    q.requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return attention(torch.nn.Module(), x, k, v, None, scaling=0.4, plan=plan)[0]

    backends.fault.cache_clear()
    checkpoint(layer, q, use_reentrant=False).sum().backward()
    assert q.grad is not None
    (expected,) = torch.autograd.grad(layer(q).sum(), q)
    torch.testing.assert_close(q.grad, expected)
