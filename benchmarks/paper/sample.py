"""Replies of the start policy to training prompts, for the judge to label.

A reward model that has seen other models' replies alone is asked about ones it does not know: `python -m
benchmarks.paper sample`, before `label`, puts the start policy's own among them.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paper.completions import SETTINGS, complete, sampled_by
from benchmarks.paper.prepare import require_prepared
from grpo_fast.config.command_line import parse
from grpo_fast.data.prompts import read_rows, spaced
from grpo_fast.errors import UserError
from grpo_fast.models.policy_files import SavedPolicy
from grpo_fast.run.metrics import read_rows as read_lines

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
OWN = "own"


def sample(folder: Path, args: argparse.Namespace, *, dry_run: bool, tell: Callable[[str], None]) -> None:
    """Complete `--prompts` training prompts with the start policy of a size, sampled as in training."""
    require_prepared(folder)
    words = ["--config", str(CONFIGS / f"qwen2.5-{args.size}.toml"), *words_of(args, "train")]
    config = parse([*words, *(["--device", args.device] if args.device else [])]).config
    SavedPolicy.read(config.policy.model)
    rows = spaced(read_rows(str(folder / "prompts.jsonl")), args.prompts)
    output = folder / f"{OWN}-{args.size}"
    tell(f"{len(rows):,} replies of {config.policy.model} to training prompts, into {output}")
    if dry_run:
        tell("Everything was checked; leave --dry-run out to start.")
        return
    complete(
        output, rows, config, sampled_by({"replies": config.policy.model}, rows, config, args), tell=tell
    )


def own_replies(folder: Path) -> list[dict[str, Any]]:
    """What `sample` has made, as rows of replies.jsonl; UserError where it was interrupted."""
    found = []
    for output in sorted(folder.glob(f"{OWN}-*")):
        rows = read_lines(output / "replies.jsonl")
        wanted = json.loads((output / SETTINGS).read_text(encoding="utf-8"))["prompts"]
        if len(rows) < wanted:
            raise UserError(
                f"{output} has {len(rows)} of {wanted} replies: go on with python -m benchmarks.paper sample"
            )
        found += [
            {"prompt": row["prompt"], "response": row["completion"], "safety": None, "source": output.name}
            for row in rows
        ]
    return found


def words_of(args: argparse.Namespace, name: str) -> list[str]:
    """The flags in the text of --train or --train-reward."""
    try:
        return shlex.split(getattr(args, name))
    except ValueError as error:
        raise UserError(f"--{name.replace('_', '-')}: {error}") from None
