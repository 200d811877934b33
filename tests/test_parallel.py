"""Several processes over gloo: what they tell each other, and that together they compute what one computes."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast.config.engine_settings import ParallelSettings
from grpo_fast.config.settings import OptimSettings, TrainConfig
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.guard import Guard
from grpo_fast.engines.relay import Relay
from grpo_fast.engines.separate import SeparateEngine
from grpo_fast.errors import Stopped, UserError
from grpo_fast.grpo import dealt, tokens_of, update
from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.packing import pack
from grpo_fast.parallel.world import ALONE, World
from grpo_fast.rollout_codec import Answers
from tests.grpo_cases import config, gradients, policy, rollout
from tests.ranks import run_on_ranks
from tests.vllm_server import VllmTestServer, engine_for

LORA = LoraSettings(rank=4)
CASES: dict[str, tuple[dict[str, Any], TrainConfig]] = {
    # model settings, and what is set; a budget of 16 takes most sequences one by one
    "grpo with a reference": ({"family": "llama"}, config("grpo", 40)),
    "tied head, one sequence at a time": ({"family": "qwen2"}, config("dapo", 16)),
    "everything at once": ({"family": "llama"}, config("dapo")),
    "adapters": ({"family": "llama", "lora": LORA}, config("grpo", 40)),
    "sequence ratios": ({"family": "qwen2"}, config("gspo", 40)),
    "head by vocabulary": (
        {"family": "llama"},
        replace(config("grpo", 40), parallel=ParallelSettings(head="vocabulary")),
    ),
    "head by vocabulary, frozen": (
        {"family": "llama", "lora": LORA},
        replace(config("dapo", 40), parallel=ParallelSettings(head="vocabulary")),
    ),
    "summed after each micro-batch": (
        {"family": "llama"},
        replace(config("dapo", 40), parallel=ParallelSettings(reduce="micro_batch")),
    ),
    "two steps on old log-probs": (
        {"family": "llama"},
        replace(config("dapo", 40), optim=OptimSettings(token_budget=40, minibatches=2)),
    ),
}


def model_of(settings: dict[str, Any], seed: int = 0) -> Policy:
    """The policy of a case; its adapters are no longer the identity."""
    made = policy(seed, **settings)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return made


def computed(world: World, name: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Gradients (as lists: they travel between processes) and metrics of a case."""
    settings, chosen = CASES[name]
    needs_copy = chosen.loss.preset == "grpo" and "lora" not in settings
    reference = model_of(settings, seed=3) if needs_copy else None
    found, metrics = gradients(model_of(settings), rollout(5, flat=1), chosen, reference, world=world)
    return {key: value.numpy() for key, value in found.items()}, metrics


def everything(world: World, folder: Path) -> dict[str, Any]:
    """All that is looked at below, in one start of the processes."""
    return {
        "gradients": {name: computed(world, name) for name in CASES},
        "world": talk(world),
        "weights": weights(world, folder),
        "refusals": refusals(world),
        "served": served(world),
    }


def talk(world: World) -> dict[str, Any]:
    """What the processes tell each other."""

    def fails() -> int:
        if world.rank == 1:
            raise UserError("the second one cannot")
        return world.rank

    def stops() -> int:
        if world.rank == 0:
            raise Stopped
        return 0

    problems = []
    for work in (fails, stops):
        try:
            world.agreed(work)
        except (UserError, Stopped) as error:
            problems.append(repr(error))
    return {
        "gathered": world.gather(b"x" * world.rank * 1000),
        "aside": world.gather(bytes([world.rank]), aside=True),
        "rows": world.gather_rows(torch.full((world.rank, 2), float(world.rank))).tolist(),
        "any": [world.any(world.rank == 1), world.any(False)],
        "first": world.first(lambda: {"rank": world.rank}),
        "problems": problems,
        "share": list(world.share(7)),
    }


def weights(world: World, folder: Path) -> dict[str, Any]:
    """A step on shared-out weights, and everything that is made of them afterwards."""
    found = {}
    for name, settings in (("plain", {"family": "qwen2"}), ("lora", {"family": "llama", "lora": LORA})):
        made = model_of(settings)
        engine = SeparateEngine(made.model, max_rows=4)
        made.shard(world)
        optimizer = Optimizer(made.trainable_parameters(), lr=0.1)
        data = rollout(2)
        update(made, optimizer, data, config("dapo", 40), lr=0.1)
        engine.push(made.named_weights(), 1)
        made.save(folder / name)
        if made.is_lora:
            made.save(folder / "merged", merge=True)
        found[name] = {key: value.numpy() for key, value in made.named_weights()}
        found[f"{name} engine"] = {
            key: value.detach().numpy() for key, value in engine.model.named_parameters()
        }
    return found if world.is_first else {}


def served(world: World) -> list[Any]:
    """Completions of stand-ins for vLLM, of which all processes but the last have one, after a step."""
    world = replace(world, generating=max(1, world.size - 1))
    made = model_of({"family": "llama"})
    relay = Relay(world, made.device)
    with ExitStack() as stack:
        if world.rank < world.generating:
            server = stack.enter_context(VllmTestServer(copy.deepcopy(made.model)))
            relay.serve(
                Guard(engine_for(server), vocabulary=made.head()["weight"].shape[0], weights=relay.held)
            )
            stack.callback(relay.close)
        made.shard(world)
        update(made, Optimizer(made.trainable_parameters(), lr=0.1), rollout(2), config("dapo", 40), lr=0.1)
        relay.push(made.named_weights(), 1)
        prompts = [[5, 6, 7 + i] for i in range(5)]
        share = world.share(len(prompts))

        def generate() -> list[tuple[list[int], int]]:
            sampling = Sampling(max_new_tokens=6)
            own = [prompts[place] for place in share]
            return [(c.token_ids, c.version) for c in relay.generate(own, 2, sampling, 3, places=share)]

        return [answer for part in world.agreed(generate) for answer in part]


def refusals(world: World) -> list[str]:
    """What several processes cannot do is refused by name."""
    problems = []
    for settings, options, kind in (
        ({"family": "qwen2"}, {"head_by_vocabulary": True}, "adamw"),
        ({"family": "llama"}, {}, "adafactor"),
    ):
        made = model_of(settings)
        try:
            made.shard(world, **options)
            Optimizer(made.trainable_parameters(), lr=0.1, kind=kind)  # type: ignore[arg-type]
        except UserError as error:
            problems.append(str(error))
    return problems


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory) -> tuple[int, list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return request.param, run_on_ranks(request.param, everything, folder), folder


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    return {name: computed(ALONE, name) for name in CASES}


def test_ranks_together_give_the_gradient_and_the_metrics_of_one(found, alone):
    size, ranks, _ = found
    for name, (expected, metrics) in alone.items():
        largest = max(abs(value).max() for value in expected.values())
        for rank in ranks:
            got, told = rank["gradients"][name]
            assert got.keys() == expected.keys(), name
            for key, value in expected.items():
                assert abs(got[key] - value).max() <= 1e-6 * largest, (size, name, key)
            assert told == ranks[0]["gradients"][name][1], name  # decisions are made from them
            for key, value in metrics.items():
                assert told[key] == pytest.approx(value, rel=2e-4, abs=1e-6), (size, name, key)


def test_what_ranks_tell_each_other(found):
    size, ranks, _ = found
    for rank, told in enumerate(each["world"] for each in ranks):
        assert told["gathered"] == [b"x" * other * 1000 for other in range(size)]
        assert told["aside"] == [bytes([other]) for other in range(size)]
        assert told["rows"] == [[float(other)] * 2 for other in range(size) for _ in range(other)]
        assert told["any"] == [True, False] and told["first"] == {"rank": 0}
        assert told["problems"] == ["UserError('rank 1: the second one cannot')", "Stopped()"]
        assert told["share"] == list(range(7))[7 * rank // size : 7 * (rank + 1) // size]


def test_engine_and_saved_models_hold_the_weights_of_all_ranks(found):
    size, ranks, folder = found
    made = ranks[0]["weights"]
    for name, saved in (("plain", "plain"), ("lora", "merged")):
        loaded = dict(Policy.load(folder / saved).model.named_parameters())
        assert loaded.keys() == made[name].keys()
        for key, value in loaded.items():
            assert (value.detach().numpy() == made[name][key]).all(), (size, name, key)
    start = dict(model_of({"family": "qwen2"}).named_weights())
    changed = [key for key, value in made["plain"].items() if (value != start[key].numpy()).any()]
    assert len(changed) == len(start)
    for key, value in made["plain engine"].items():
        assert (value == made["plain"][key]).all()
    adapters = [key for key in made["lora engine"] if "lora_" in key]
    assert adapters and (folder / "lora" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_shared_out_is_refused_by_name(found):
    _, ranks, _ = found
    for rank in ranks:
        assert "parallel.head" in rank["refusals"][0] and "adafactor" in rank["refusals"][1]


def test_servers_of_some_ranks_answer_for_all_with_the_weights_of_all(found):
    _, ranks, _ = found
    expected = served(ALONE)
    assert len(expected) == 10 and all(version == 1 for _, version in expected)
    for rank in ranks:
        assert [tuple(answer) for answer in rank["served"]] == expected


def test_micro_batches_are_dealt_out_evenly():
    data = rollout(6)
    owner = data.prompt_of
    completions = [completion.token_ids for completion in data.completions]

    def pack_to(budget: int):
        return pack(data.prompt_ids, completions, prompt_of=owner, token_budget=budget)

    for budget in (16, 60, 10_000):
        for size in (1, 2, 3, 4, 16):
            shares = [dealt(pack_to, budget, World(rank, size, size)) for rank in range(size)]
            assert len({len(share) for share in shares}) == 1
            counted = [batch for share in shares for batch in share if batch.counts]
            places = sorted(place for batch in counted for place in batch.sequence_index.tolist())
            assert places == list(range(len(completions)))
            assert all(tokens_of(batch) <= budget for batch in counted if len(batch.sequence_index) > 1)
            if budget == 10_000 and size in (2, 3, 4):  # one row would have taken it all
                work = [sum(tokens_of(batch) for batch in share if batch.counts) for share in shares]
                assert max(work) <= 1.5 * sum(work) / size, (size, work)


def test_answers_travel_to_the_bit():
    data = rollout(3)
    scored = replace(
        data.scored,
        rewards=torch.tensor([[0.1, float("nan")]] * 12),
        distance=torch.rand(12),
        outside=torch.rand(12) > 0.5,
        unscored=2,
    )
    texts = [f"{i} \N{SNOWMAN} \x00\n" for i in range(12)]
    sent = Answers(completions=data.completions, texts=texts, scored=scored)
    got = Answers.from_bytes(sent.to_bytes())
    assert got.texts == texts
    assert [vars(a) | {"logprobs": a.logprobs.tolist()} for a in got.completions] == [
        vars(b) | {"logprobs": b.logprobs.tolist()} for b in sent.completions
    ]
    for name, value in vars(scored).items():
        other = getattr(got.scored, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other.nan_to_num(-1), value.nan_to_num(-1)) and other.dtype == value.dtype
        else:
            assert other == value
    both = sent + got
    assert len(both.completions) == 24 and both.scored.rewards.shape == (24, 2) and both.scored.unscored == 4
