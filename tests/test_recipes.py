"""Every recipe in `configs/` passes --dry-run with tiny weights of its architecture in the real model's place."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from grpo_fast import train_reward
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.train import main
from tests.tiny import save_policy, write_prompts
from tests.tiny_models import config_of

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.toml") if path.stem != "reward-model")
OBJECTIVES = ("safety", "politeness", "meaningfulness", "actionability")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """Qwen2 models with a tied (0.5B) and an untied head (7B, 14B), a reward model with four heads, prompts."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, tied in (("tied", True), ("untied", False)):
        save_policy(folder / name, "qwen2", tie_word_embeddings=tied, max_position_embeddings=4096)
    tokenizer = build_tokenizer()
    shape = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    layout = Layout(heads=tuple(Head(name=name) for name in OBJECTIVES))
    RewardModel.from_config(
        config_of("qwen2", pad_token_id=tokenizer.pad_token_id, max_position_embeddings=4096, **shape),
        tokenizer,
        layout,
    ).save(folder / "reward-model")
    write_prompts(folder / "prompts.jsonl", 80)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_passes_the_dry_run(recipe: Path, stand_ins: Path, capsys):
    flags = ["--config", recipe, "--output-dir", stand_ins / "runs", "--device", "cpu", "--dry-run"]
    settings = tomllib.loads(recipe.read_text())
    if settings.get("policy", {}).get("model"):
        tied = "0.5B" in settings["policy"]["model"]
        flags += ["--policy.model", stand_ins / ("tied" if tied else "untied")]
        flags += ["--reward.model", stand_ins / "reward-model"]
        for name in ("prompts", "eval-prompts"):
            flags += [f"--data.{name}", stand_ins / "prompts.jsonl"]
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert "Everything was checked" in printed.out
    words = re.sub(r"[│\s]+", " ", printed.out)  # the table may break a line
    assert "safety × 1, politeness × 1, meaningfulness × 1, actionability × 1" in words
    assert not (stand_ins / "runs").exists()


def test_the_reward_model_recipe_passes_the_dry_run(stand_ins: Path, capsys):
    aspects = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    rated = [
        {
            "prompt": f"p{i}",
            "response": f"r{i}",
            **{name: (i + k) % 5 for k, name in enumerate(aspects, start=1)},
        }
        for i in range(1, 41)
    ]
    compared = json.loads(
        (ROOT / "tests" / "data" / "ratings" / "pku-saferlhf.jsonl").read_text().splitlines()[0]
    )
    pairs = [{**compared, "prompt": f"q{i}", "better_response_id": i % 2} for i in range(40)]
    ratings = [stand_ins / "helpsteer2.jsonl", stand_ins / "pku.jsonl"]
    for path, rows in zip(ratings, (rated, pairs), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--config", ROOT / "configs" / "reward-model.toml", "--output-dir", stand_ins / "runs"]
    flags += ["--device", "cpu", "--dry-run", "--backbone.model", stand_ins / "tied", "--data.eval-size", 8]
    with pytest.raises(SystemExit) as stop:
        train_reward.main([str(flag) for flag in [*flags, "--data.ratings", *ratings]])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    for head in ("helpfulness", "verbosity", "safety", "better", "safer"):
        assert head in printed.out
    assert "Everything was checked" in printed.out and not (stand_ins / "runs").exists()


def test_the_sizes_of_the_paper_are_there():
    assert {path.stem for path in RECIPES} >= {
        "miniature",
        "qwen2.5-0.5b",
        "qwen2.5-7b",
        "qwen2.5-7b-lora",
        "qwen2.5-14b-lora",
    }
