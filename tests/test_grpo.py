"""One update: the split into micro-batches, skipping, normalisers, old and reference log-probs."""

import copy
from dataclasses import replace

import pytest
import torch

from grpo_fast.config.resolve import loss_config
from grpo_fast.config.settings import OptimSettings
from grpo_fast.grpo import split_by_prompt, step_normalizer, update, with_signal
from grpo_fast.models.policy import LoraSettings
from grpo_fast.optim.optimizer import Optimizer
from tests.grpo_cases import GROUP, config, gradients, policy, rollout


@pytest.mark.parametrize("preset", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo", "vespo", "luspo"])
def test_any_split_into_micro_batches_gives_the_same_gradient(preset):
    model, data = policy(), rollout()
    reference = policy(seed=3) if preset == "grpo" else None
    whole, metrics = gradients(model, data, config(preset), reference)
    assert whole and all(torch.isfinite(g).all() for g in whole.values())
    for budget in (16, 40, 100):
        split, other = gradients(model, data, config(preset, budget), reference)
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-4, abs=1e-6)
        assert other["entropy"] == pytest.approx(metrics["entropy"], rel=1e-4)


@pytest.mark.parametrize("preset", ["dapo", "gspo", "dr_grpo"])
def test_skipping_groups_without_signal_changes_no_gradient(preset, monkeypatch):
    model, data = policy(), rollout(flat=1)
    skipped, metrics = gradients(model, data, config(preset))
    assert metrics["skipped_sequences"] == GROUP
    monkeypatch.setattr("grpo_fast.grpo.with_signal", lambda rollout, sequences, *_, **__: sequences)
    full, metrics = gradients(model, data, config(preset))
    assert metrics["skipped_sequences"] == 0
    for name, gradient in full.items():
        torch.testing.assert_close(skipped[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_kl_term_keeps_groups_without_advantage():
    data = rollout(flat=0)
    everything = list(range(12))
    assert with_signal(data, everything, loss_config(config("grpo")), mask_truncated=False) == everything
    assert (
        with_signal(data, everything, loss_config(config("dapo")), mask_truncated=False) == everything[GROUP:]
    )
    kept = with_signal(data, everything, loss_config(config("grpo")), mask_truncated=True)
    assert kept == [i for i in everything if data.completions[i].finish_reason == "stop"] and len(kept) < 12


def test_normalisers_count_what_the_presets_say():
    data, everything = rollout(), list(range(12))
    tokens = sum(len(c.token_ids) for c in data.completions)
    for preset, expected in (
        ("grpo", 12),
        ("dapo", tokens),
        ("dr_grpo", 12 * 12),
        ("luspo", 12),
        ("gspo", 12),
    ):
        settings = config(preset)
        assert step_normalizer(data, everything, loss_config(settings), settings) == expected, preset


def test_a_rollout_without_any_signal_updates_nothing():
    model, data = policy(), rollout()
    data = replace(data, advantages=torch.zeros(12))
    before = copy.deepcopy(model.state_dict())
    optimizer = Optimizer(model.trainable_parameters(), lr=1e-2)
    metrics = update(model, optimizer, data, config("dapo"), lr=1e-2)
    assert metrics["skipped_sequences"] == 12 and metrics["trained_tokens"] == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_several_updates_clip_against_the_old_policy():
    model, data = policy(), rollout()
    settings = replace(config("dapo"), optim=OptimSettings(updates_per_rollout=4, minibatches=3))
    optimizer = Optimizer(model.trainable_parameters(), lr=3e-2)
    metrics = update(model, optimizer, data, settings, lr=3e-2)
    assert optimizer.inner.state_dict()["state"][0]["step"] == 12
    assert metrics["ratio_max"] > 1.05  # the policy has moved away from the one that is old
    assert metrics["clip_low_frac"] + metrics["clip_high_frac"] > 0
    assert [len(part) for part in split_by_prompt(data, 2)] == [GROUP, 2 * GROUP]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_the_kl_term_is_zero_at_the_reference_and_grows(lora):
    model, data = policy(lora=lora), rollout()
    reference = None if lora else model.frozen_copy()
    optimizer = Optimizer(model.trainable_parameters(), lr=1e-2)
    first = update(model, optimizer, data, config("grpo"), lr=1e-2, reference=reference)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    second = update(model, optimizer, data, config("grpo"), lr=1e-2, reference=reference)
    assert second["kl"] > 1e-4


def test_an_update_makes_good_completions_likelier():
    model, data = policy(), rollout(prompts=1)
    data = replace(data, advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]))
    from grpo_fast.grpo import packed

    def logprob(i: int) -> float:
        (batch,) = packed(data, [i], model, 8192)
        return model.logprobs(batch)[0].sum().item()

    before = [logprob(i) for i in range(4)]
    optimizer = Optimizer(model.trainable_parameters(), lr=1e-2)
    for _ in range(3):
        update(model, optimizer, data, config("dapo"), lr=1e-2)
    after = [logprob(i) for i in range(4)]
    assert after[0] + after[1] > before[0] + before[1]
    assert after[2] + after[3] < before[2] + before[3]
