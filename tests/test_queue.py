"""The order of the prompts: every one once an epoch, and those without signal less often."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast.data.queue import PromptQueue
from grpo_fast.errors import UserError


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_every_prompt_once_an_epoch(n: int, size: int, seed: int):
    queue = PromptQueue(n, seed)
    steps = [queue.take(size) for _ in range(math.ceil(2 * n / size))]
    stream = [prompt for step in steps for prompt in step]
    assert sorted(stream[:n]) == sorted(stream[n : 2 * n]) == list(range(n))
    assert all(len(step) == size for step in steps)
    assert max(Counter(steps[-1]).values()) <= math.ceil(size / n) + 1


def test_the_order_changes_with_epoch_and_seed():
    queue = PromptQueue(50, 0)
    first, second = queue.take(50), queue.take(50)
    assert first != second != PromptQueue(50, 1).take(50)


def visits(rest: int, epochs: int, flat: set[int]) -> Counter:
    """How often each of 10 prompts is taken while some are always flat, in steps of 3, for as many places as epochs."""
    queue, seen = PromptQueue(10, 3, rest=rest), Counter()
    while queue.state.get("place", 0) < 10 * epochs:
        prompts = queue.take(3)
        queue.record(prompts, [prompt in flat for prompt in prompts])
        queue.settle()
        seen.update(prompts)
    return seen


def test_prompts_without_signal_rest_longer_and_longer_and_come_back():
    seen = visits(3, 40, flat={2, 7})
    # passed over 1, 2, 3, 3, ... times between two visits
    for prompt in (2, 7):
        assert 10 <= seen[prompt] <= 12
    assert all(39 <= seen[prompt] <= 41 for prompt in range(10) if prompt not in (2, 7))
    assert set(visits(0, 40, flat={2, 7}).values()) <= {39, 40, 41}


def test_one_good_group_ends_the_rest():
    queue = PromptQueue(1, 0, rest=5)
    for _ in range(3):
        queue.record(queue.take(1), [True])
    queue.record(queue.take(1), [False])
    queue.settle()
    place = queue.state["place"]
    queue.take(1)
    queue.settle()
    assert queue.state == {"place": place + 1}


def test_everything_flat_still_gives_prompts():
    queue = PromptQueue(4, 0, rest=3)
    for _ in range(50):
        prompts = queue.take(4)
        queue.record(prompts, [True] * 4)
    assert len(prompts) == 4


def test_state_moves_with_settle_alone_and_brings_a_queue_back():
    queue = PromptQueue(12, 5, rest=2)
    for _ in range(7):
        prompts = queue.take(5)
        queue.record(prompts, [prompt % 3 == 0 for prompt in prompts])
        queue.settle()
    saved = dict(queue.state)
    coming = queue.take(5)  # for a batch that is never used
    assert queue.state == saved
    again = PromptQueue(12, 5, rest=2, state=dict(saved))
    assert [again.take(5), again.take(5)] == [coming, queue.take(5)]


@pytest.mark.parametrize(
    "state",
    [
        {"place": -5},
        {"place": float("nan")},
        {"place": 0.5},
        {"place": 1e300},
        {"place/1": 1},
        {"rest/1": 1e300},
        {"rest/1": 3},
        {"rest/6": 1},
        {"rest/x": 1},
        {"flat/-1": 1},
        {"else": 1},
    ],
    ids=str,
)
def test_a_place_that_no_queue_has_is_refused(state):
    with pytest.raises(UserError, match="place among its 6 prompts is damaged"):
        PromptQueue(6, 0, rest=2, state=dict(state))
    queue = PromptQueue(6, 0, rest=2)
    with pytest.raises(UserError, match="damaged"):
        queue.taken = state
    PromptQueue(6, 0, rest=2, state={"place": 7, "rest/1": 2, "flat/1": 5})
