"""Reward model, training, evaluation, one after the other: `python -m benchmarks.paper run`.

Every stage is a process of its own, which gives its GPU memory back, and one that was interrupted goes on from its
checkpoint when the same command is called again.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.paper.evaluate import evaluate
from benchmarks.paper.label import labelled, require_labelled
from benchmarks.paper.prepare import require_prepared
from benchmarks.paper.rubrics import (
    OBJECTIVES,
    judge_settings,
    open_judges,
    require_independent,
    require_judge,
)
from benchmarks.paper.sample import CONFIGS, words_of
from grpo_fast.config.settings import TrainConfig
from grpo_fast.errors import UserError

REWARD_MODEL = "reward-model"


def run(folder: Path, args: argparse.Namespace, *, dry_run: bool, tell: Callable[[str], None]) -> int:
    """All stages that are not done yet. Exit code 0, or that of the stage that ended otherwise (130: interrupted).

    The judge is asked for one rating before anything is trained, so that hours later it is there.
    """
    require_prepared(folder)
    reward_model: Path = args.reward_model or folder / REWARD_MODEL / "model"
    if args.reward_model is None and not reward_model.is_dir():
        require_labelled(folder)
    require_judge(args, "run")
    more, more_reward = (words_of(args, name) for name in ("train", "train_reward"))
    if any(word.startswith("--judge") for word in more):
        raise UserError(
            "--train must not name a judge: the judge of the evaluation may not be seen by the training"
        )
    if not args.same_judge:
        said = labelled(folder)
        require_independent(getattr(args, "judge.model"), said["judge"] if said else None, TrainConfig())
    for judge in open_judges([judge_settings(args, OBJECTIVES, None)]):
        judge.close()
    device = ["--device", args.device] if args.device else []
    if not reward_model.is_dir():
        if args.reward_model is not None:
            raise UserError(f"--reward-model {reward_model} does not exist")
        flags = ["--config", CONFIGS / "reward-model.toml", "--output-dir", folder, "--name", REWARD_MODEL]
        flags += ["--data.ratings", folder / "ratings.jsonl", *device, *more_reward]
        if code := _stage(
            "grpo_fast.train_reward", folder / REWARD_MODEL, flags, device, dry_run=dry_run, tell=tell
        ):
            return code
    trained = folder / args.size
    if dry_run and not reward_model.is_dir():
        tell(
            "the training is checked when there is a reward model (another one with four heads: --reward-model FOLDER)"
        )
        return 0
    if not (trained / "model").is_dir():
        flags = [
            "--config",
            CONFIGS / f"qwen2.5-{args.size}.toml",
            "--output-dir",
            folder,
            "--name",
            args.size,
        ]
        flags += ["--data.prompts", folder / "prompts.jsonl", "--data.eval-prompts", folder / "heldout.jsonl"]
        flags += ["--reward.model", reward_model, *device, *more]
        if code := _stage("grpo_fast.train", trained, flags, device, dry_run=dry_run, tell=tell):
            return code
        if dry_run:
            return 0
    return evaluate(trained, args, dry_run=dry_run, tell=tell)


def _stage(
    module: str,
    path: Path,
    flags: Sequence[str | Path],
    device: Sequence[str],
    *,
    dry_run: bool,
    tell: Callable[[str], None],
) -> int:
    """Run a command of the trainer, or go on with what it left in `path`; its exit code."""
    begun = (path / "config.toml").is_file()
    if begun and dry_run:
        tell(f"{path} was interrupted; it would go on from its checkpoint")
        return 0
    words = ["--resume", str(path), *device] if begun else [str(flag) for flag in flags]
    tell(f"python -m {module} {shlex.join(words)}")
    return trainer(module, [*words, *(["--dry-run"] if dry_run else [])])


def trainer(module: str, words: Sequence[str]) -> int:
    """Exit code of a command of the trainer, run as a process of its own."""
    return subprocess.run([sys.executable, "-m", module, *words], check=False).returncode
