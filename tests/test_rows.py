"""Out of memory while generating: the same completions with fewer at a time, groups reported once."""

from __future__ import annotations

import copy

import pytest
import torch

from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.rows import FewerRows
from grpo_fast.errors import UserError
from tests.families import ragged, tiny_model

PROMPTS = ragged(groups=5)[0]
SAMPLING = Sampling(max_new_tokens=24, stop_token_ids=(3, 4, 5))


class Scarce(LocalEngine):
    """Runs out of memory with more than `fitting` rows, once it has reported `after` groups."""

    fitting, after, calls = 4, 0, 0

    def generate(self, *args, on_group=None, **kwargs):
        self.calls += 1
        seen = 0

        def counted(prompt, group):
            nonlocal seen
            if on_group is not None:
                on_group(prompt, group)
            seen += 1
            if self.max_rows > self.fitting and seen >= self.after:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        if self.max_rows > self.fitting and not self.after:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().generate(*args, on_group=counted, **kwargs)


def tokens(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("after", [0, 2])
def test_the_rollout_is_drawn_again_with_half_the_rows(after) -> None:
    model = tiny_model("qwen2")
    wanted = tokens(LocalEngine(copy.deepcopy(model)).generate(PROMPTS, 4, SAMPLING, seed=3))
    inner = Scarce(model, max_rows=256)
    inner.after = after
    told: list[str] = []
    engine, reported = FewerRows(inner, tell=told.append), []
    found = engine.generate(
        PROMPTS, 4, SAMPLING, 3, on_group=lambda prompt, group: reported.append((prompt, group))
    )
    assert tokens(found) == wanted
    assert sorted(prompt for prompt, _ in reported) == list(range(len(PROMPTS)))
    for prompt, group in reported:  # what was scored is what is trained on, the very log-probs
        assert all(a is b for a, b in zip(group, found[prompt * 4 : prompt * 4 + 4], strict=True))
    assert inner.max_rows == 2 and inner.calls == 4  # 20 completions: 10, 5, 2 at a time
    assert len(told) == 1 and "--rollout.max-rows 2" in told[0]
    engine.generate(PROMPTS, 4, SAMPLING, seed=4)
    assert inner.calls == 5 and len(told) == 1  # it remembers


def test_one_completion_that_does_not_fit_ends_the_run_with_advice() -> None:
    inner = Scarce(tiny_model("qwen2"), max_rows=8)
    inner.fitting = 0
    with pytest.raises(UserError, match="while_training"):
        FewerRows(inner, tell=print).generate(PROMPTS, 1, SAMPLING, seed=0)
    assert inner.max_rows == 1


def test_it_hands_on_what_is_none_of_its_business() -> None:
    inner = LocalEngine(tiny_model("qwen2"))
    engine = FewerRows(inner, tell=print)
    engine.push([], 7)
    assert inner.version == 7 and engine.generate(PROMPTS, 1, SAMPLING, seed=0)[0].version == 7
    with pytest.raises(UserError, match="prompt 0 is empty"):
        engine.generate([[]], 1, SAMPLING, seed=0)
