"""The method at work: GRPO raises what the weights reward and lowers what they punish, as the judge sees it."""

import json
import shutil
from pathlib import Path

import pytest

from grpo_fast.miniature.world import OBJECTIVES
from tests.test_train import run_command
from tests.tiny import write_config

# The default run, cut short; the warm start and the reward model are trained once for both signs.
SHORT = """
[run]
steps = 25
eval_every = 0
"""


def judged(run: Path) -> dict[str, dict[str, float]]:
    objectives = json.loads((run / "summary.json").read_text())["objectives"]
    return {
        name: {when: objectives[name][f"judge_{when}"]["mean"] for when in ("before", "after")}
        for name in objectives
    }


@pytest.fixture(scope="module")
def raised(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    recipe = write_config(folder / "short.toml", SHORT)
    assert run_command("--config", recipe, "--output-dir", folder, "--name", "raised") == 0
    return folder / "raised"


@pytest.mark.slow
def test_every_objective_rises_on_held_out_prompts(raised):
    scores = judged(raised)
    for name in OBJECTIVES:
        assert scores[name]["after"] > scores[name]["before"], scores
    mean = sum(scores[name]["after"] - scores[name]["before"] for name in OBJECTIVES) / len(OBJECTIVES)
    assert mean > 0.05, scores


@pytest.mark.slow
def test_with_negated_weights_every_objective_falls(raised):
    lowered = raised.parent / "lowered"
    lowered.mkdir()
    negated = ", ".join(f"{name} = -1.0" for name in OBJECTIVES)
    settings = (raised / "config.toml").read_text()
    assert "weights = {}" in settings
    (lowered / "config.toml").write_text(settings.replace("weights = {}", f"weights = {{{negated}}}"))
    for part in ("start", "reward_model"):
        shutil.copytree(raised / part, lowered / part)
    assert run_command("--resume", lowered) == 0
    scores = judged(lowered)
    assert all(scores[name]["before"] == judged(raised)[name]["before"] for name in OBJECTIVES)
    for name in OBJECTIVES:
        assert scores[name]["after"] < scores[name]["before"], scores
