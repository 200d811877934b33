"""The reward model on a CUDA device: the CPU's scores, features and distances, and scoring beside generation."""

from __future__ import annotations

import pytest
import torch

from grpo_fast.config.settings import RewardSettings
from grpo_fast.data.prompts import Prompt
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_set import RewardSet
from grpo_fast.scoring import Scorer, Scoring
from grpo_fast.trust.distance import FeatureStatistics
from tests.tiny_models import byte_tokenizer, config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [f"Question {i}: how do I wash a cup?" for i in range(12)]
REPLIES = [f"First take {'some ' * (i % 5)}water, then {i} drops of soap." for i in range(11)] + [""]
LAYOUT = Layout(heads=(Head(name="safety", mean=0.5, std=0.2), Head(name="tone")), members=2)


def model_on(device: str, dtype: str = "float32") -> RewardModel:
    model = RewardModel.from_config(
        config_of("qwen2"), byte_tokenizer(), LAYOUT, seed=3, dtype=dtype, device=device
    )
    found = model.predict(model.encode(PROMPTS, REPLIES))
    model.statistics = FeatureStatistics.fit(found.features, found.features)
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_the_gpu_says_what_the_cpu_says(dtype: str, tolerance: float):
    cpu, gpu = model_on("cpu"), model_on("cuda", dtype)
    want = cpu.predict(cpu.encode(PROMPTS, REPLIES), 64)
    for budget in (4096, 64):
        got = gpu.predict(gpu.encode(PROMPTS, REPLIES), budget)
        torch.testing.assert_close(got.scores, want.scores, atol=tolerance, rtol=0)
        torch.testing.assert_close(got.features, want.features, atol=4 * tolerance, rtol=4 * tolerance)
        assert got.distance is not None and got.distance.isfinite().all()


def test_scoring_beside_other_work_gives_the_same_rewards():
    model = model_on("cuda")
    scorer = Scorer.create(RewardSettings(), RewardSet.of([model]), None, token_budget=64)
    prompts = [Prompt(text, [], None, {}) for text in PROMPTS]
    plain = scorer(prompts, REPLIES)
    busy = torch.randn(2048, 2048, device="cuda")
    with Scoring(scorer, overlap=True) as scoring:
        for i in range(0, 12, 4):
            scoring.put(range(i, i + 4), prompts[i : i + 4], REPLIES[i : i + 4])
            busy = (busy @ busy).clamp(-1, 1)  # stands for the decoding that goes on meanwhile
        beside = scoring.result()
    torch.testing.assert_close(beside.rewards, plain.rewards, atol=1e-4, rtol=0)
    torch.testing.assert_close(beside.spread, plain.spread, atol=1e-4, rtol=0)


def test_a_step_of_training_lowers_the_loss():
    from grpo_fast.data.rated import RatedExample
    from grpo_fast.models.reward_fit import fit

    model = model_on("cuda")
    examples = [
        RatedExample(prompt=p, replies=(r,), labels=({"safety": float(i % 2), "tone": float(i % 3)},))
        for i, (p, r) in enumerate(zip(PROMPTS, REPLIES, strict=True))
    ]
    losses = fit(model, examples, epochs=30, batch_size=12, lr=3e-3, token_budget=128)
    assert losses[-1] < 0.5 * losses[0]
