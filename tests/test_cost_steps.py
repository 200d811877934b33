"""One step of every algorithm at a size of its own, as a GPU will run it, here on the CPU."""

import pytest

from benchmarks.cost.steps import CHOICES, Model, line, measure
from benchmarks.step.work import Shape, Size

TINY = Shape(hidden=32, layers=1, heads=2, key_heads=1, inner=64, vocabulary=300)
MODEL = Model(
    shape=TINY, reward=TINY, size=Size(prompts=16, group=2, prompt_tokens=8, new_tokens=6, token_budget=256)
)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", list(CHOICES))
def test_a_step_is_measured(name, lora_rank):
    model = Model(shape=TINY, reward=TINY, size=MODEL.size, lora_rank=lora_rank)
    row = measure(model, name, "cpu")
    assert row["generated_tokens"] == 32 * 6
    assert row["seconds"] == pytest.approx(sum(row["phase_s"].values()))
    assert (row["phase_s"]["reference"] > 0) == (name != "grpo_no_kl")
    assert (row["flops"]["values"] > 0) == name.startswith("ppo")
    parts = row["memory"]["parts"]
    if lora_rank:
        assert parts["optimizer"] < parts["policy"] and parts["reference"] == 0
    assert "GiB" in line({"size": "tiny", "algorithm": name, "error": None, **row})
