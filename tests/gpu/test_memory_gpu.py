"""The planner against the allocator of a GPU: random weights of Qwen2.5 0.5B's shape, two real steps."""

import pytest
import torch

from benchmarks.memory import BAR, measured_alone, prediction
from benchmarks.memory_cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["gpu-0.5b-checkpointing", "gpu-0.5b-lora"])
def test_the_planned_peak_is_near_the_allocators(name: str):
    found = measured_alone(CASES[name])
    assert found["error"] is None
    assert prediction(CASES[name], found["peak"])["ratio"] == pytest.approx(1.0, abs=BAR)
