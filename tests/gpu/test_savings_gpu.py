"""What makes a large run fit, on a CUDA device: memory that is really lower, results that are the same."""

import copy
import gc

import pytest
import torch

from grpo_fast.budget import TokenBudget
from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.settings import (
    LossSettings,
    OptimSettings,
    PolicySettings,
    RolloutSettings,
    TrainConfig,
)
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.base import Completion
from grpo_fast.grpo import update
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.activations import activations_on_host
from grpo_fast.models.policy import LoraSettings, Policy
from grpo_fast.optim.host import _host_block
from grpo_fast.optim.optimizer import Kind, Optimizer, Where
from grpo_fast.rollout import Rollout
from grpo_fast.scoring import Scored
from tests.tiny import causal_lm, save_policy

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GROUP, PROMPTS, LENGTH = 8, 8, 256
MIB = 2**20
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


@pytest.fixture(autouse=True)
def empty_device():
    yield
    gc.collect()
    torch.cuda.empty_cache()


def policy(**options) -> Policy:
    """25 million bfloat16 parameters."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = causal_lm("qwen2", len(tokenizer), **SHAPE)
    model.to(DEVICE, torch.bfloat16)  # type: ignore[call-arg]
    return Policy.from_model(model, tokenizer, **options)


def rollout(seed: int = 1) -> Rollout:
    draw = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(5, 500, (n,), generator=draw).tolist()

    count = PROMPTS * GROUP
    return Rollout(
        prompts=[Prompt(f"p{i}", ids(32), None, {}) for i in range(PROMPTS)],
        prompt_of=[i // GROUP for i in range(count)],
        completions=[
            Completion(ids(LENGTH), -torch.rand(LENGTH, generator=draw), "stop", 0) for _ in range(count)
        ],
        texts=[""] * count,
        scored=Scored(rewards=torch.zeros(count, 1), spread=torch.zeros(count, 1)),
        advantages=torch.randn(count, generator=draw),
    )


def settings(token_budget: int = 4096) -> TrainConfig:
    return TrainConfig(
        policy=PolicySettings(),
        loss=LossSettings(preset="dapo"),
        optim=OptimSettings(token_budget=token_budget),
        rollout=RolloutSettings(group_size=GROUP, max_new_tokens=LENGTH, prompts_per_step=PROMPTS),
        engine=EngineSettings(max_mismatch=0.0),  # the rollouts' log-probs are made up
    )


def held() -> int:
    """Bytes of live tensors on the device."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def numbers(model: Policy) -> int:
    return sum(p.numel() for p in model.trainable_parameters())


def relative(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    a, b = (torch.cat([t.detach().float().flatten().cpu() for t in part]) for part in (found, wanted))
    return ((a - b).norm() / b.norm()).item()


def stepped(where: Where, kind: Kind = "adamw", steps: int = 2):
    """Masters after `steps` steps from made-up gradients that are the same to the last bit everywhere."""
    model = policy()
    start = [p.detach().float().clone() for p in model.trainable_parameters()]
    optimizer = Optimizer(model.trainable_parameters(), lr=1e-3, where=where, kind=kind)
    for step in range(steps):
        optimizer.reload()
        draw = torch.Generator(DEVICE).manual_seed(step)
        for _ in range(2):  # micro-batches
            loss = sum(
                (p * torch.randn(p.shape, generator=draw, device=DEVICE, dtype=p.dtype)).sum()
                for p in model.trainable_parameters()
            )
            loss.backward()  # pyright: ignore
        optimizer.step(1e-3)
        optimizer.offload()
    return model, optimizer, start


def test_between_updates_the_states_are_off_the_device_and_nothing_changes():
    before = held()
    _, plain, _ = stepped("device")
    wanted = [m.detach().clone().cpu() for m in plain.masters]
    full = held() - before
    del plain, _
    before = held()
    model, optimizer, _ = stepped("while_training")
    away = held() - before
    assert full - away > 11.5 * numbers(model)  # 12 bytes a parameter: master and two averages
    state = optimizer.state_dict()
    assert held() - before == away  # saving brings nothing back
    assert all(torch.equal(state["masters"][str(i)].cpu(), m) for i, m in enumerate(wanted))
    optimizer.reload()
    torch.cuda.synchronize()
    assert all(torch.equal(m.cpu(), w) for m, w in zip(optimizer.masters, wanted, strict=True))


def test_on_the_host_the_device_holds_the_weights_alone():
    _, plain, start = stepped("device")
    wanted = [m.detach().clone() for m in plain.masters]
    del plain, _
    before = held()
    model, optimizer, _ = stepped("host")
    del _
    assert held() - before < 2.3 * numbers(
        model
    )  # bfloat16 weights; masters, states and gradients are elsewhere
    assert all(m.device.type == "cpu" for m in optimizer.masters)
    moved = [(m.cpu() - s.cpu()) for m, s in zip(optimizer.masters, start, strict=True)]
    expected = [(w.cpu() - s.cpu()) for w, s in zip(wanted, start, strict=True)]
    assert relative(moved, expected) < 1e-4  # AdamW of the CPU and of the device round differently
    torch.cuda.synchronize()
    for parameter, master in zip(model.trainable_parameters(), optimizer.masters, strict=True):
        assert torch.equal(parameter.detach().cpu(), master.detach().bfloat16())


@pytest.mark.parametrize("where", ["while_training", "host"])
def test_an_update_with_states_elsewhere_agrees(where):
    found = {}
    for place in ("device", where):
        model = policy()
        start = [p.detach().clone() for p in model.trainable_parameters()]
        optimizer = Optimizer(model.trainable_parameters(), lr=1e-3, where=place, eps=1.0)
        for _ in range(2):  # from the second on there are states
            optimizer.offload()
            optimizer.reload()
            torch.cuda.reset_peak_memory_stats()
            metrics = update(model, optimizer, rollout(), settings(), lr=1e2)
            peak = torch.cuda.max_memory_allocated()
        moved = [
            a.detach().float() - b.float() for a, b in zip(model.trainable_parameters(), start, strict=True)
        ]
        found[place] = moved, metrics["grad_norm"], peak
        size = numbers(model)
        del model, optimizer
        held()
    assert found[where][1] == pytest.approx(found["device"][1], rel=1e-2)
    assert relative(found[where][0], found["device"][0]) < 5e-2
    if where == "host":
        assert found["device"][2] - found["host"][2] > 11 * size


def test_page_locked_memory_is_exactly_as_large_as_asked_for():
    block = _host_block(3 * MIB + 64, locked=True)
    assert block.nbytes == 3 * MIB + 64 and block.is_pinned()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_activations_leave_the_device(checkpointing):
    class Probe(Optimizer):
        def step(self, lr, **given):
            gradients.extend(master.grad.clone().cpu() for master in self.masters if master.grad is not None)
            return super().step(lr, **given)

    found = {}
    for on_host in (False, True):
        model = policy(gradient_checkpointing=checkpointing)
        model.activations_on_host = on_host
        gradients: list[torch.Tensor] = []
        optimizer = Probe(model.trainable_parameters(), lr=0.0)
        torch.cuda.reset_peak_memory_stats()
        before = held()
        update(model, optimizer, rollout(), settings(8192), lr=0.0)
        found[on_host] = gradients, torch.cuda.max_memory_allocated() - before
        del optimizer
    assert (
        relative(found[True][0], found[False][0]) < 1e-2
    )  # sums over tokens are not in a fixed order on a device
    saved = found[False][1] - found[True][1]
    inputs = 6 * 6000 * 512 * 2  # one bfloat16 hidden state a layer; micro-batches have about 6000 tokens
    assert saved > (0.25 if checkpointing else 4) * inputs


def test_a_stack_of_layers_gets_the_same_gradients_to_the_last_bit():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.GELU()) for _ in range(24))
    ).to(DEVICE)
    inputs = torch.randn(8192, 1024, device=DEVICE)
    layers(inputs).square().sum().backward()
    wanted = [p.grad.clone() for p in layers.parameters() if p.grad is not None]
    layers.zero_grad()
    before = held()
    kept = layers(inputs)
    plainly = held() - before
    del kept
    before = held()
    with activations_on_host(layers.parameters()):
        out = layers(inputs)
    assert held() - before < 0.3 * plainly
    torch.cuda.reset_peak_memory_stats()
    out.square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 0.6 * plainly
    found = [p.grad for p in layers.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_device_that_is_too_small_gets_smaller_micro_batches():
    def run(budget: int):
        model = policy()
        start = [p.detach().clone() for p in model.trainable_parameters()]
        optimizer = Optimizer(model.trainable_parameters(), lr=1e-3, eps=1.0)
        chosen = TokenBudget(budget)
        metrics = update(model, optimizer, rollout(), settings(), lr=1e2, budget=chosen)
        moved = [
            a.detach().float() - b.float() for a, b in zip(model.trainable_parameters(), start, strict=True)
        ]
        return moved, metrics, chosen

    reserved = []
    for budget in (1024, 20000):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        wanted, plain, _ = run(budget)
        reserved.append(torch.cuda.max_memory_reserved())
    assert reserved[1] > 1.5 * reserved[0]
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((0.6 * reserved[0] + 0.4 * reserved[1]) / total)
    try:
        found, metrics, chosen = run(20000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert metrics["oom_retries"] >= 1 and chosen.tokens < 20000
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
    assert relative(found, wanted) < 5e-2


def test_8_bit_states_take_two_bytes_a_parameter():
    pytest.importorskip("torchao", reason="the optional extra lowbit")
    sizes = {}
    for kind in ("adamw", "adamw8bit"):
        before = held()
        model, optimizer, start = stepped("device", kind=kind)
        del start
        sizes[kind] = held() - before
        if kind == "adamw":
            del model, optimizer
    assert sizes["adamw"] - sizes["adamw8bit"] > 5.5 * numbers(model)
    state = copy.deepcopy(optimizer.state_dict())
    again = Optimizer(policy().trainable_parameters(), lr=1e-3, kind="adamw8bit")
    again.load_state_dict(state)
    for index, values in again.state_dict()["inner"]["state"].items():
        assert all(torch.equal(v, state["inner"]["state"][index][n]) for n, v in values.items())


def test_a_base_in_4_bits_is_trained_under_an_adapter(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the optional extra lowbit")
    path = save_policy(tmp_path / "base", "qwen2", **SHAPE)
    before = held()
    plain = Policy.load(path, dtype="bfloat16", device=DEVICE)
    size = held() - before
    del plain
    before = held()
    model = Policy.load(path, dtype="bfloat16", device=DEVICE, lora=LoraSettings(rank=8), quantize="nf4")
    assert held() - before < 0.45 * size
    model.self_check()
    optimizer = Optimizer(model.trainable_parameters(), lr=1e-3)
    for seed in range(2):
        metrics = update(model, optimizer, rollout(seed), settings(), lr=1e-3)
    assert metrics["grad_norm"] > 0 and metrics["skipped_updates"] == 0
    ids = torch.arange(5, 69, device=DEVICE)[None]
    model.save(tmp_path / "merged", merge=True)
    merged = Policy.load(tmp_path / "merged", dtype="bfloat16", device=DEVICE)
    with torch.no_grad():
        wanted, found = (m.model.base_model(ids, use_cache=False).last_hidden_state for m in (model, merged))
    assert relative([found], [wanted]) < 5e-2
