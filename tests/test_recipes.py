"""Every recipe in `configs/` passes --dry-run with tiny weights of its architecture in the real model's place."""

import re
import tomllib
from pathlib import Path

import pytest

from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.reward_data import Head
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.train import main
from tests.tiny import save_policy, write_prompts
from tests.tiny_models import config_of

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
OBJECTIVES = ("safety", "politeness", "meaningfulness", "actionability")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """Qwen2 models with a tied (0.5B) and an untied head (7B, 14B), a reward model with four heads, prompts."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, tied in (("tied", True), ("untied", False)):
        save_policy(folder / name, "qwen2", tie_word_embeddings=tied, max_position_embeddings=4096)
    tokenizer = build_tokenizer()
    shape = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    heads = [Head(name=name) for name in OBJECTIVES]
    RewardModel.from_config(
        config_of("qwen2", pad_token_id=tokenizer.pad_token_id, **shape), tokenizer, heads
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


def test_the_sizes_of_the_paper_are_there():
    assert {path.stem for path in RECIPES} >= {
        "miniature",
        "qwen2.5-0.5b",
        "qwen2.5-7b",
        "qwen2.5-7b-lora",
        "qwen2.5-14b-lora",
    }
