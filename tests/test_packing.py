"""Packing: every token exactly once, in budget, deterministic, and in an order that can be undone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast.packing import PackedBatch, pack

tokens = st.integers(0, 50)
prompt_lists = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=5)


@st.composite
def problems(draw):
    prompts = draw(prompt_lists)
    completions = draw(st.lists(st.lists(tokens, max_size=12), min_size=1, max_size=14))
    owner = draw(
        st.lists(st.integers(0, len(prompts) - 1), min_size=len(completions), max_size=len(completions))
    )
    options = {
        "token_budget": draw(st.integers(1, 80)),
        "share_prefix": draw(st.booleans()),
        "keep_last": draw(st.booleans()),
    }
    return prompts, completions, owner, options


def visible(batch: PackedBatch, position: int) -> list[int]:
    """Positions that `position` attends to, itself last."""
    plan = batch.plan
    segment = next(s for s in range(len(plan.q_lens)) if plan.q_starts[s] <= position < plan.q_starts[s + 1])
    first, shared = plan.prefix_starts[segment], plan.prefix_lens[segment]
    return [*range(first, first + shared), *range(plan.q_starts[segment], position + 1)]


@settings(max_examples=150, deadline=None)
@given(problems())
def test_what_is_predicted_and_from_what(problem) -> None:
    prompts, completions, owner, options = problem
    batches = pack(prompts, completions, prompt_of=owner, **options)
    seen = []
    for batch in batches:
        assert batch.input_ids.shape == batch.position_ids.shape == (1, batch.plan.length)
        assert min(batch.plan.q_lens) > 0
        ids = batch.input_ids[0].tolist()
        for s, i in enumerate(batch.sequence_index.tolist()):
            seen.append(i)
            part = slice(int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1]))
            assert batch.targets[part].tolist() == completions[i]
            # the context from which each token is predicted is exactly the prompt and what was said before
            for t, position in enumerate(batch.hidden_index[part].tolist()):
                context = visible(batch, position)
                assert [ids[p] for p in context] == prompts[owner[i]] + completions[i][:t]
                assert batch.position_ids[0, context].tolist() == list(range(len(context)))
            if options["keep_last"]:
                assert batch.last_index is not None
                context = visible(batch, int(batch.last_index[s]))
                assert [ids[p] for p in context] == prompts[owner[i]] + completions[i]
    assert sorted(seen) == list(range(len(completions)))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_budget_and_determinism(problem) -> None:
    prompts, completions, owner, options = problem
    batches = pack(prompts, completions, prompt_of=owner, **options)
    for batch in batches:
        assert batch.plan.length <= options["token_budget"] or len(batch.sequence_index) == 1
    again = pack(prompts, completions, prompt_of=owner, **options)
    assert [b.input_ids.tolist() for b in batches] == [b.input_ids.tolist() for b in again]
    assert [b.sequence_index.tolist() for b in batches] == [b.sequence_index.tolist() for b in again]


def test_a_shared_prompt_is_stored_once() -> None:
    prompts = [[1, 2, 3, 4]]
    completions = [[5, 6, 7], [8], [9, 10]]
    (batch,) = pack(prompts, completions, prompt_of=[0, 0, 0], token_budget=100)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4]]
    assert batch.hidden_index.tolist() == [3, 4, 5, 3, 3, 6]
    assert batch.targets.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.last_index is None
    (unshared,) = pack(prompts, completions, prompt_of=[0, 0, 0], token_budget=100, share_prefix=False)
    assert unshared.plan.length == 15 and not unshared.plan.shares_prefix


def test_groups_stay_together_and_rows_are_full() -> None:
    prompts = [[0] * 10 for _ in range(8)]
    completions = [[1] * 11 for _ in range(32)]
    owner = [i // 4 for i in range(32)]
    batches = pack(prompts, completions, prompt_of=owner, token_budget=100)
    assert len(batches) == 4
    for batch in batches:
        assert batch.plan.length == 100
        assert len({owner[i] for i in batch.sequence_index.tolist()}) == 2


def test_gather_follows_the_batch() -> None:
    completions = [[1, 2], [3, 4, 5], [6]]
    values = [torch.tensor(c, dtype=torch.float32) for c in completions]
    for batch in pack([[0]], completions, prompt_of=[0, 0, 0], token_budget=5):
        assert batch.gather(values).tolist() == batch.targets.tolist()
    with pytest.raises(ValueError, match=r"per_sequence\[1\] must have shape \(3,\)"):
        pack([[0]], completions, prompt_of=[0, 0, 0], token_budget=50)[0].gather(
            [values[0], values[2], values[2]]
        )


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pack([[1], []], [[1], [2]], token_budget=9)
    with pytest.raises(ValueError, match="completion 0 names prompt 3"):
        pack([[1]], [[1]], prompt_of=[3], token_budget=9)
    with pytest.raises(ValueError, match="token_budget"):
        pack([[1]], [[1]], token_budget=0)
    with pytest.raises(ValueError, match="one entry for each of 2"):
        pack([[1]], [[1], [2]], prompt_of=[0], token_budget=5)
    assert pack([[1]], [], token_budget=5) == []


def test_moving_keeps_everything() -> None:
    (batch,) = pack([[1, 2]], [[3, 4], [5]], prompt_of=[0, 0], token_budget=20)
    moved = batch.to("cpu")
    assert moved.plan.q_lens == batch.plan.q_lens and torch.equal(moved.targets, batch.targets)


@settings(max_examples=150, deadline=None)
@given(problems(), st.data())
def test_what_belongs_together_lands_in_one_row(problem, data) -> None:
    prompts, completions, owner, options = problem
    options = {**options, "share_prefix": True}
    bundle = data.draw(st.lists(st.integers(0, 5), min_size=len(completions), max_size=len(completions)))
    batches = pack(prompts, completions, prompt_of=owner, together=bundle, **options)
    rows = [batch.sequence_index.tolist() for batch in batches]
    assert sorted(i for row in rows for i in row) == list(range(len(completions)))
    for batch, row in zip(batches, rows, strict=True):
        inside = {bundle[i] for i in row}
        assert all(i in row for i in range(len(completions)) if bundle[i] in inside)
        assert batch.plan.length <= options["token_budget"] or len(inside) == 1
        ids = batch.input_ids[0].tolist()
        for s, i in enumerate(row):  # each still sees its own prompt and what was said before, nothing else
            part = slice(int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1]))
            assert batch.targets[part].tolist() == completions[i]
            for t, position in enumerate(batch.hidden_index[part].tolist()):
                assert [ids[p] for p in visible(batch, position)] == prompts[owner[i]] + completions[i][:t]
    again = pack(prompts, completions, prompt_of=owner, together=bundle, **options)
    assert rows == [batch.sequence_index.tolist() for batch in again]


def test_bundles_hold_each_prompt_once_and_fill_rows() -> None:
    prompts, completions = [[1, 2, 3], [4, 5]], [[6], [7, 8], [9], [10]]
    (first, second) = pack(
        prompts, completions, prompt_of=[0, 0, 1, 1], together=[7, 7, 3, 3], token_budget=6, keep_last=True
    )
    assert first.input_ids.tolist() == [[1, 2, 3, 6, 7, 8]] and second.input_ids.tolist() == [[4, 5, 9, 10]]
    (whole,) = pack(
        prompts, completions, prompt_of=[0, 0, 1, 1], together=[7, 7, 3, 3], token_budget=10, keep_last=True
    )
    assert whole.input_ids.tolist() == [[1, 2, 3, 6, 7, 8, 4, 5, 9, 10]]
    apart = pack(prompts, completions, prompt_of=[0, 0, 1, 1], token_budget=4, keep_last=True)
    kept = pack(
        prompts, completions, prompt_of=[0, 0, 1, 1], together=[7, 7, 3, 3], token_budget=4, keep_last=True
    )
    assert len(apart) == 3 and [batch.plan.length for batch in kept] == [6, 4]
    (across,) = pack(prompts, completions, prompt_of=[0, 0, 1, 1], together=[0, 1, 0, 1], token_budget=99)
    assert across.sequence_index.tolist() == [1, 3, 0, 2]  # two prompts in each bundle, the longer one first
