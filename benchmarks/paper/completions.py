"""Completions of a policy, one a prompt, kept on disk as they come: of held-out prompts before and after training, and
of training prompts for the reward model to be trained on.

Letters: n prompts.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from grpo_fast.attention.backends import use
from grpo_fast.config.resolve import resolve_device, resolve_dtype
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Row, as_messages, tokenize
from grpo_fast.engines.choose import engine_of
from grpo_fast.errors import UserError
from grpo_fast.models.policy import Policy
from grpo_fast.models.policy_files import SavedPolicy
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_set import RewardSet, read_saved
from grpo_fast.run.metrics import read_rows, write_atomically
from grpo_fast.task import sampling_of

WHEN = ("before", "after")
SETTINGS = "sampled.json"


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """How completions are made: what must not change between two parts of one file."""

    models: dict[str, str]
    """Name of the file: folder or hub id of the policy."""
    prompts: int
    """How many."""
    prompts_hash: str
    temperature: float
    max_new_tokens: int
    seed: int
    system_prompt: str
    batch: int
    """Completions that are made, and kept, at once; what is sampled depends on it above temperature 0."""


def sampled_by(
    models: dict[str, str], rows: Sequence[Row], config: TrainConfig, args: argparse.Namespace
) -> Sampled:
    """The settings of completions of `rows` by `models`, from a run's configuration and the flags."""
    return Sampled(
        models=models,
        prompts=len(rows),
        prompts_hash=hashlib.sha256(json.dumps([row.prompt for row in rows]).encode()).hexdigest()[:16],
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens or config.rollout.max_new_tokens,
        seed=args.seed,
        system_prompt=config.data.system_prompt,
        batch=args.batch,
    )


def check_settings(folder: Path, sampled: Sampled) -> None:
    """UserError where the folder holds completions that were made otherwise; notes the settings where it is new."""
    path = folder / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in asdict(sampled).items():
            if before.get(name) != value:
                raise UserError(
                    f"{folder} holds completions made with {name} = {before.get(name)}, not {value}: give another "
                    "folder with --output, or delete that one"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(sampled), indent=1))


def complete(
    folder: Path, rows: Sequence[Row], config: TrainConfig, sampled: Sampled, *, tell: Callable[[str], None]
) -> dict[str, list[str]]:
    """{name: n completions} of each of `sampled.models`, one a prompt; what the folder holds is not made again.

    UserError where the folder holds completions that were made otherwise.
    """
    check_settings(folder, sampled)
    found = {}
    for name, model in sampled.models.items():
        path = folder / f"{name}.jsonl"
        done = read_rows(path)
        whole = len(done) // sampled.batch * sampled.batch if len(done) < len(rows) else len(rows)
        if whole < len(done) or _torn(path):
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in done[:whole]))
        if whole < len(rows):
            _go_on(path, model, rows, whole, config, sampled, tell=tell)
            _free(resolve_device(config))
        found[name] = [row["completion"] for row in read_rows(path)]
    return found


def _go_on(
    path: Path,
    model: str,
    rows: Sequence[Row],
    first: int,
    config: TrainConfig,
    sampled: Sampled,
    *,
    tell: Callable[[str], None],
) -> None:
    """Append the completions of `rows` from `first` on, a batch at a time."""
    device = resolve_device(config)
    use(config.policy.attention)
    saved = SavedPolicy.read(model)
    prompts = tokenize(rows, saved.tokenizer, system_prompt=sampled.system_prompt)
    policy = Policy.load(saved, device=device, dtype=resolve_dtype(config, device))
    policy.eval()

    def decode(token_ids: list[int]) -> str:
        return str(policy.tokenizer.decode(token_ids, skip_special_tokens=True))

    rollout = replace(config.rollout, temperature=sampled.temperature, max_new_tokens=sampled.max_new_tokens)
    sampling = sampling_of(rollout, policy)
    engine = engine_of(config, policy, path.parent, decode=decode, tell=tell)
    try:
        engine.push(policy.named_weights(), 0)
        for start in range(first, len(rows), sampled.batch):
            part = prompts[start : start + sampled.batch]
            made = engine.generate([p.token_ids for p in part], 1, sampling, (sampled.seed << 32) + start)
            kept = [
                {
                    "prompt": prompt.plain,
                    "kind": prompt.columns.get("kind"),
                    "source": prompt.columns.get("source"),
                    "completion": decode(completion.token_ids),
                    "tokens": len(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                }
                for prompt, completion in zip(part, made, strict=True)
            ]
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in kept))
            tell(f"{path.stem}: {start + len(part):,} of {len(rows):,} completions")
    finally:
        engine.close()


def score(
    config: TrainConfig, rows: Sequence[Row], completions: dict[str, list[str]]
) -> dict[str, dict[str, torch.Tensor]]:
    """{before, after: {head: n scores of the reward model, float64}}, NaN where it could not read a reply."""
    device = resolve_device(config)
    models = [
        RewardModel.load(saved, device=device, dtype=resolve_dtype(config, device))
        for saved in read_saved(config.reward.model)
    ]
    rewards = RewardSet.of(models)
    asked = [as_messages(row.prompt, config.data.system_prompt) or row.plain for row in rows]
    scores = {}
    for when, texts in completions.items():
        table = rewards.predict(asked, texts, config.optim.token_budget).scores.double().cpu()
        scores[when] = {name: table[:, column] for column, name in enumerate(rewards.names)}
    del models, rewards
    _free(device)
    return scores


def _torn(path: Path) -> bool:
    """Whether the last line was cut off."""
    return path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
