"""A step of every algorithm on a CUDA device in bfloat16: trained, counted, and its memory told apart."""

import pytest
import torch

from benchmarks.cost.steps import CHOICES, Model, build, measure
from benchmarks.step.work import Shape, Size

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = Shape(hidden=256, layers=2, heads=4, key_heads=2, inner=512, vocabulary=2048)
SIZE = Size(prompts=4, group=4, prompt_tokens=32, new_tokens=32, token_budget=2048)


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("name", list(CHOICES))
def test_a_step_is_measured(name, lora_rank):
    row = measure(Model(shape=SHAPE, reward=SHAPE, size=SIZE, lora_rank=lora_rank), name, "cuda")
    parts = row["memory"]["parts"]
    lab, _ = build(Model(shape=SHAPE, reward=SHAPE, size=SIZE, lora_rank=lora_rank), name, "cuda")
    trained = sum(p.numel() for p in lab.policy.trainable_parameters())
    assert parts["optimizer"] >= 12 * trained, "masters and two moments of every trained weight"
    assert parts["working"] > 0 and row["memory"]["peak"] <= torch.cuda.get_device_properties(0).total_memory
    assert row["seconds"] == pytest.approx(sum(row["phase_s"].values()))
    assert row["generated_tokens"] == 16 * 32
