"""AdamW with 8-bit states: its memory, its nearness to AdamW, its checkpoints. Needs the extra `lowbit`."""

import pytest
import torch

from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.run import checkpoint

pytest.importorskip("torchao", reason="the optional extra lowbit")


def layers() -> torch.nn.Sequential:
    """Weights of 8192 numbers, which are quantised, and biases, which are not."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))


def trained(model: torch.nn.Module, optimizer: Optimizer, steps: range, of: int = 30) -> list[torch.Tensor]:
    """Those of `of` steps, at a learning rate that rises from step to step."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.reload()
        inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        (model(inputs) - inputs).float().square().mean().backward()
        optimizer.step(1e-2 * (step + 1) / of)
        optimizer.offload()
    return [p.detach().clone() for p in model.parameters()]


def test_states_take_a_byte_a_number_and_a_scale_a_block():
    model = layers()
    optimizer = Optimizer(model.parameters(), lr=1e-2, kind="adamw8bit")
    trained(model, optimizer, range(1))
    weight = optimizer.state_dict()["inner"]["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scale = weight[f"{name}:codes"], weight[f"{name}:scale"]
        assert codes.dtype == torch.uint8 and codes.numel() == 8192
        assert scale.dtype == torch.float32 and scale.numel() == 8192 // 256
    assert all(type(value) is torch.Tensor for value in weight.values())


def test_it_learns_like_adamw():
    losses = {}
    for kind in ("adamw", "adamw8bit"):
        model = layers()
        start = [p.detach().clone() for p in model.parameters()]
        weights = trained(model, Optimizer(model.parameters(), lr=1e-2, kind=kind), range(30))
        inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(99))
        losses[kind] = (model(inputs) - inputs).square().mean().item()
        losses[kind, "moved"] = torch.cat([(a - b).flatten() for a, b in zip(weights, start, strict=True)])
    moved, near = losses["adamw", "moved"], losses["adamw8bit", "moved"]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.05)
    assert torch.nn.functional.cosine_similarity(moved, near, dim=0) > 0.98
    assert not torch.equal(moved, near)


def test_the_learning_rate_of_each_step_is_used():
    model = layers()
    optimizer = Optimizer(model.parameters(), lr=1.0, kind="adamw8bit")
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 64)).square().sum().backward()
    optimizer.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("where", ["device", "while_training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_to_the_same_weights(tmp_path, dtype, where):
    straight = layers().to(dtype)
    wanted = trained(straight, Optimizer(straight.parameters(), lr=1e-2, kind="adamw8bit"), range(6))
    first = layers().to(dtype)
    optimizer = Optimizer(first.parameters(), lr=1e-2, kind="adamw8bit", where=where)
    weights = trained(first, optimizer, range(3))
    state = optimizer.state_dict()
    moments, plain = checkpoint.flatten_optimizer(state["inner"])
    named = {str(i): weight for i, weight in enumerate(weights)}
    groups = {"model": named, "optimizer": moments, "masters": state["masters"]}
    path = checkpoint.save(tmp_path, 3, groups, {"optimizer": plain})

    groups, saved = checkpoint.load(path)
    resumed = layers().to(dtype)
    second = Optimizer(resumed.parameters(), lr=1e-2, kind="adamw8bit", where=where)
    with torch.no_grad():
        for index, parameter in enumerate(resumed.parameters()):
            parameter.copy_(groups["model"][str(index)])
    inner = checkpoint.unflatten_optimizer(groups["optimizer"], saved["optimizer"])
    second.load_state_dict({"inner": inner, "masters": groups["masters"], "skipped_steps": 0})
    again = second.state_dict()["inner"]["state"]
    for index, values in state["inner"]["state"].items():
        for name, value in values.items():
            assert torch.equal(again[index][name], value), (index, name)
    for values in second.inner.state.values():
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            assert getattr(values[name], "signed", signed) is signed  # biases are not quantised
    found = trained(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_offloaded_codes_leave_the_device():
    model = layers()
    optimizer = Optimizer(model.parameters(), lr=1e-2, kind="adamw8bit", where="while_training")
    trained(model, optimizer, range(2))  # ends with offload
    states = [s for s in optimizer.inner.state.values() if hasattr(s["exp_avg"], "codes")]
    assert len(states) == 2
    assert all(
        s[name].codes.untyped_storage().nbytes() == 0 for s in states for name in ("exp_avg", "exp_avg_sq")
    )
