"""Several GPUs over NCCL give the gradient of one, saved and gone on with; needs at least two."""

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast import state
from grpo_fast.grpo import update
from grpo_fast.models.sharded import full
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.parallel.world import ALONE, World
from tests.grpo_cases import config, gradients, policy, rollout
from tests.ranks import run_on_ranks
from tests.test_parallel import CASES, model_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def computed(world: World, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, float]]:
    """Gradients and metrics of a case on this process's GPU."""
    settings, chosen = CASES[name]
    needs_copy = chosen.loss.preset == "grpo" and "lora" not in settings
    device = torch.device("cuda", world.rank)
    model = model_of(settings).to(device, dtype)
    reference = model_of(settings, seed=3).to(device, dtype) if needs_copy else None
    found, metrics = gradients(model, rollout(5, flat=1), chosen, reference, world=world)
    return {key: value.float().cpu().numpy() for key, value in found.items()}, metrics


def everything(world: World, folder: Path) -> dict[str, Any]:
    """All cases in both types, and a checkpoint of shards read back."""
    found: dict[str, Any] = {
        str(dtype): {name: computed(world, name, dtype) for name in CASES}
        for dtype in (torch.float32, torch.bfloat16)
    }
    weights = []
    for again in (False, True):
        made = policy(family="llama").to(torch.device("cuda", world.rank), torch.bfloat16)
        made.shard(world)
        optimizer = Optimizer(made.trainable_parameters(), lr=0.05)
        if again:
            state.restore(folder, made.model, optimizer, world=world)
        else:
            update(made, optimizer, rollout(3), config("dapo", 60), lr=0.05)
            state.save(folder, 1, made.model, optimizer, keep=1, world=world)
        weights.append([full(parameter).cpu() for parameter in made.model.parameters()])
    found["read back"] = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_gpus_together_give_the_gradient_and_the_metrics_of_one(size, tmp_path):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    ranks = run_on_ranks(size, everything, tmp_path, device="cuda", limit_s=300)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for name in CASES:
            expected, metrics = computed(ALONE, name, dtype)
            largest = max(abs(value).max() for value in expected.values())
            for rank in ranks:
                got, told = rank[str(dtype)][name]
                for key, value in expected.items():
                    assert abs(got[key] - value).max() <= limit * largest, (name, dtype, key)
                assert told == ranks[0][str(dtype)][name][1]
                assert told["loss"] == pytest.approx(metrics["loss"], rel=1e-2, abs=1e-4)
    assert all(rank["read back"] for rank in ranks)
