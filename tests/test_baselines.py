"""PPO, DPO and the policy gradients: formulas against plain PyTorch, gradients whatever the split, equal terms."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines import dpo, ppo
from benchmarks.baselines.dpo import DPO
from benchmarks.baselines.ppo import PPO
from benchmarks.cost.algorithms import ALGORITHMS
from benchmarks.cost.cell import marks_of
from benchmarks.cost.lab import Reference, Sequences
from grpo_fast.attention.function import ATTENTION_NAME
from grpo_fast.data.queue import PromptQueue
from grpo_fast.errors import UserError
from tests.cost_cases import lab, prepared


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("cost"))


def one_by_one(policy, prompt, completion):
    """Log-probs of a completion's tokens by the model's own forward pass, with gradients."""
    ids = torch.tensor([[*prompt, *completion]])
    policy.model.set_attn_implementation("eager")
    logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    policy.model.set_attn_implementation(ATTENTION_NAME)
    return torch.log_softmax(logits.double(), -1)[range(len(completion)), completion]


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def assert_close(found, expected):
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_advantages_are_discounted_sums_of_the_errors_to_come():
    torch.manual_seed(0)
    gamma, lam = 0.97, 0.9
    rewards = [torch.randn(n, dtype=torch.float64) for n in (1, 5, 3)]
    values = [torch.randn(n, dtype=torch.float64) for n in (1, 5, 3)]
    advantages, returns = ppo.generalised_advantages(rewards, values, gamma=gamma, lam=lam)
    for r, v, a, g in zip(rewards, values, advantages, returns, strict=True):
        after = torch.cat([v[1:], v.new_zeros(1)])
        delta = r + gamma * after - v
        expected = torch.stack(
            [(delta[t:] * (gamma * lam) ** torch.arange(len(r) - t)).sum() for t in range(len(r))]
        )
        torch.testing.assert_close(a, expected)
        torch.testing.assert_close(g, expected + v)


def test_the_score_comes_at_the_last_token_and_the_penalty_at_each():
    old, ref = (
        [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])],
        [torch.tensor([-1.5, -1.0]), torch.tensor([-3.5])],
    )
    first, second = ppo.token_rewards(torch.tensor([4.0, -1.0]), old, ref, 0.1)
    torch.testing.assert_close(first, torch.tensor([-0.05, 0.1 + 4.0]))
    torch.testing.assert_close(second, torch.tensor([-0.05 - 1.0]))


def test_clipped_value_loss_takes_the_larger_error():
    known = {"returns": torch.tensor([0.0, 1.0]), "old_values": torch.tensor([1.0, 0.0])}
    values = torch.tensor([0.0, 0.1])
    # the first has come all the way, but clipped it is still 0.8 off; the second has moved by less than the clip
    torch.testing.assert_close(ppo.value_loss(values, known, 0.2), torch.tensor(0.5 * (0.64 + 0.81)))
    torch.testing.assert_close(ppo.value_loss(values, known, 0.0), torch.tensor(0.5 * 0.81))


def ppo_case(place, settings) -> tuple[Sequences, Any, dict[str, Any]]:
    """Sequences, a value model with something to say, and what an update of them needs to know."""
    sequences = place.sample(place.task.prompts[:6], 1, 0)
    torch.manual_seed(1)
    value = ppo.ValueHead(place) if settings.shared else ppo.ValueNetwork.of(place, settings)
    for parameter in value.parameters():
        if parameter.shape[0] == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    lengths = [len(c.token_ids) for c in sequences.completions]
    known = {
        "old_logprobs": [
            logprobs + 0.05 * torch.randn(n)
            for logprobs, n in zip(ppo.look_up_logprobs(place, sequences.packed(place)), lengths, strict=True)
        ],
        "old_values": ppo.look_up_values(place, value, sequences.packed(place)),
        "advantages": [torch.randn(n) for n in lengths],
        "returns": [torch.randn(n) for n in lengths],
    }
    return sequences, value, known


@pytest.mark.parametrize("shared", [False, True])
def test_ppo_gradients_are_those_of_plain_pytorch_however_they_are_packed(world, shared):
    settings = PPO(shared=shared)
    place = lab(world)
    policy = place.policy
    sequences, value, known = ppo_case(place, settings)
    ppo.add_up_gradients(place, settings, value, sequences.packed(place), known, 0.2)
    found = gradients(policy), gradients(value)
    small = replace(place, config=replace(place.config, optim=replace(place.config.optim, token_budget=40)))
    assert len(sequences.packed(small)) > len(sequences.packed(place))
    ppo.add_up_gradients(small, settings, value, sequences.packed(small), known, 0.2)
    assert_close(gradients(policy), found[0])
    assert_close(gradients(value), found[1])

    tokens = sum(len(c.token_ids) for c in sequences.completions)
    for i, completion in enumerate(sequences.completions):
        prompt = sequences.prompts[i].token_ids
        of = {name: values[i] for name, values in known.items()}
        logprobs = one_by_one(policy, prompt, completion.token_ids)
        ratio = (logprobs - of["old_logprobs"]).exp()
        gain = torch.minimum(ratio * of["advantages"], ratio.clamp(0.8, 1.2) * of["advantages"])
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        body: Any = policy.model if shared else value.model.model
        body.set_attn_implementation("eager")
        states = body.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        body.set_attn_implementation(ATTENTION_NAME)
        score = value.score if shared else value.model.model.score
        values = F.linear(states, score.weight, score.bias)[:, 0]
        torch.testing.assert_close(values.detach(), of["old_values"], rtol=1e-4, atol=1e-5)
        errors = 0.5 * (values - of["returns"]).square().sum()  # nothing has moved, so nothing is clipped
        weight = settings.value_coef if shared else 1.0
        ((weight * errors - gain.sum()) / tokens).backward()
    assert_close(found[0], gradients(policy))
    assert_close(found[1], gradients(value))


def test_dpo_gradients_are_those_of_plain_pytorch_however_they_are_packed(world):
    place = lab(world)
    policy, settings = place.policy, DPO(batches=1, samples=3, beta=0.3)
    queue = PromptQueue(len(place.task.prompts), 0)
    pairs = dpo.new_pairs(place, settings, queue, Reference(place), 0)
    chosen = list(range(len(pairs)))[::-1]
    assert len(chosen) >= 3
    with torch.no_grad():
        for parameter in policy.parameters():  # away from the reference, else every margin is 0
            parameter.add_(0.02 * torch.randn_like(parameter))
    loss, _ = dpo.add_up_gradients(place, settings, pairs, chosen)
    found = gradients(policy)
    small = replace(place, config=replace(place.config, optim=replace(place.config.optim, token_budget=60)))
    torch.testing.assert_close(
        dpo.add_up_gradients(small, settings, pairs, chosen)[0], loss, rtol=1e-5, atol=1e-6
    )
    assert_close(gradients(policy), found)

    total = torch.zeros((), dtype=torch.float64)
    for pair in chosen:
        gains = []
        for row in (2 * pair, 2 * pair + 1):
            prompt = pairs.sequences.prompts[pairs.sequences.prompt_of[row]].token_ids
            logprobs = one_by_one(policy, prompt, pairs.sequences.completions[row].token_ids)
            gains.append((logprobs - pairs.ref_logprobs[row]).sum())
        total = total - F.logsigmoid(settings.beta * (gains[0] - gains[1])) / len(chosen)
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert_close(found, gradients(policy))


def test_the_better_completion_of_a_pair_stands_first_and_ties_make_none(world, monkeypatch):
    place = lab(world)
    settings = DPO(batches=1, samples=4)
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.5] * 4, [1.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.2, 0.7]])
    monkeypatch.setattr(type(place), "scalar", lambda *_, **__: scores.flatten())
    pairs = dpo.new_pairs(place, settings, PromptQueue(64, 0), Reference(place), 0)
    assert pairs.sequences.prompt_of == [0, 0, 2, 2, 3, 3]
    sampled = lab(world).sample([place.task.prompts[i] for i in PromptQueue(64, 0).take(4)], 4, 0).token_ids
    assert pairs.sequences.token_ids == [sampled[i] for i in (1, 0, 8, 9, 15, 12)]
    scores.fill_(0.5)
    with pytest.raises(UserError, match="no pair"):
        dpo.new_pairs(place, settings, PromptQueue(64, 0), Reference(place), 0)


def test_missing_rewards_count_as_their_objective_s_mean(world):
    place = lab(world)
    rewards = torch.tensor([[1.0, 0.0], [float("nan"), 4.0], [3.0, 8.0]])
    place = replace(
        place, task=replace(place.task, scorer=replace(place.task.scorer, weights=torch.tensor([1.0, 2.0])))
    )
    torch.testing.assert_close(place.scalar(rewards, standardize=False), torch.tensor([1.0, 10.0, 19.0]))
    standard = place.scalar(rewards, standardize=True)
    assert standard.mean().abs() < 1e-6 and standard[1].abs() < 1e-6


class Spy:
    """An engine that counts what it hands out."""

    def __init__(self, engine):
        self._engine, self.tokens, self.prompts = engine, 0, []

    def generate(self, prompts, n, sampling, seed, **options):
        found = self._engine.generate(prompts, n, sampling, seed, **options)
        self.tokens += sum(len(c.token_ids) for c in found)
        self.prompts += prompts
        return found

    def __getattr__(self, name):
        return getattr(self._engine, name)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_on_equal_terms(world, name):
    """The same start, prompts and frozen reward model; every token that was generated counts."""
    spies = []
    place = lab(world, engine=lambda engine: spies.append(Spy(engine)) or spies[0])
    before = marks_of(place.task)
    assert before == marks_of(lab(world).task)
    choice = {"batches": 2} if name.startswith("dpo") else {}
    algorithm = ALGORITHMS[name]
    algorithm.train(place, algorithm.chosen(choice))
    after, ledger = marks_of(place.task), place.ledger
    assert after["start"] != before["start"], "nothing was trained"
    assert {k: v for k, v in after.items() if k != "start"} == {
        k: v for k, v in before.items() if k != "start"
    }
    spent = ledger.spent
    assert spent.generated_tokens == spies[0].tokens > 0
    assert spent.flops == sum(ledger.flops.values()) and 0 < spent.training_flops <= ledger.flops["update"]
    assert spent.wall_s == pytest.approx(sum(ledger.phase_s.values()))
    training = {tuple(prompt.token_ids) for prompt in place.task.prompts}
    assert all(tuple(prompt) in training for prompt in spies[0].prompts)
    first = [place.task.prompts[i].token_ids for i in PromptQueue(len(place.task.prompts), 0).take(4)]
    assert spies[0].prompts[:4] == first, "prompts come in the same order"
    parts = ledger.memory()["parts"]
    assert (parts.get("value_model", 0) > 0) == name.startswith("ppo")
    assert (parts["reference"] > 0) == (name not in ("grpo_no_kl", "rloo", "reinforce_pp"))


def test_all_algorithms_have_as_many_settings_to_choose_from():
    assert len({len(algorithm.grid) for algorithm in ALGORITHMS.values()}) == 1
    for algorithm in ALGORITHMS.values():
        assert len({algorithm.chosen(choice) for choice in algorithm.grid}) == len(algorithm.grid)


def test_the_value_network_can_begin_as_the_reward_model(world):
    place = lab(world)
    value = ppo.ValueNetwork.of(place, PPO(value_from="reward_model"))
    own, theirs = value.model.model.base_model, place.reward_models[0].model.base_model
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], weight)


def test_another_seed_another_order(world):
    orders = [list(dpo.orders(64, DPO(), 8, lab(world, seed=seed).seed(0))) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(pair for batch in orders[0] for pair in batch) == list(range(64))
    sequences = lab(world).sample(lab(world).task.prompts[:8], 1, 0)
    found = []
    for seed in (0, 1):
        batches = ppo.minibatches(lab(world, seed=seed), sequences, PPO(epochs=1), 0)
        found.append([sorted(i for b in part for i in b.sequence_index.tolist()) for part in batches])
    assert found[0] != found[1] and sorted(i for part in found[0] for i in part) == list(range(8))
