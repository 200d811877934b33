"""One completion per held-out prompt before and after training, kept on disk as they come.

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
from grpo_fast.engines.choose import builtin_engine
from grpo_fast.errors import UserError
from grpo_fast.models.policy import Policy, SavedPolicy
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_set import RewardSet, read_saved
from grpo_fast.run.metrics import read_rows, write_atomically
from grpo_fast.task import sampling_of

WHEN = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """How the completions are made: what must not change between two parts of one evaluation."""

    before: str
    """The start policy."""
    after: str
    """The trained one."""
    prompts: str
    """Hash of the prompts."""
    temperature: float
    max_new_tokens: int
    seed: int
    system_prompt: str
    batch: int
    """Completions that are made, and kept, at once; what is sampled depends on it above temperature 0."""


def settings_of(run: Path, config: TrainConfig, args: argparse.Namespace, rows: Sequence[Row]) -> Sampled:
    """The settings of an evaluation of `run` with the flags `args`."""
    return Sampled(
        before=config.policy.model,
        after=str(run / "model"),
        prompts=hashlib.sha256(json.dumps([row.prompt for row in rows]).encode()).hexdigest()[:16],
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens or config.rollout.max_new_tokens,
        seed=args.seed,
        system_prompt=config.data.system_prompt,
        batch=args.batch,
    )


def check_settings(folder: Path, sampled: Sampled) -> None:
    """UserError where the folder holds completions that were made otherwise; notes the settings where it is new."""
    path = folder / "sampled.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in asdict(sampled).items():
            if before.get(name) != value:
                raise UserError(
                    f"{folder} holds completions made with {name} = {before.get(name)}, not {value}: give --output "
                    "FOLDER for another evaluation of the run"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(sampled), indent=1))


def complete(
    folder: Path,
    rows: Sequence[Row],
    config: TrainConfig,
    sampled: Sampled,
    *,
    tell: Callable[[str], None],
) -> dict[str, list[str]]:
    """{before, after: n completions}; what is in the folder already is not made again."""
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    use(config.policy.attention)
    found = {}
    for when, model in zip(WHEN, (sampled.before, sampled.after), strict=True):
        path = folder / f"{when}.jsonl"
        done = read_rows(path)
        whole = len(done) // sampled.batch * sampled.batch if len(done) < len(rows) else len(rows)
        if whole < len(done) or _torn(path):
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in done[:whole]))
        if whole < len(rows):
            saved = SavedPolicy.read(model)
            prompts = tokenize(rows, saved.tokenizer, system_prompt=sampled.system_prompt)
            policy = Policy.load(saved, device=device, dtype=dtype)
            policy.eval()

            def decode(token_ids: list[int], policy: Policy = policy) -> str:
                return str(policy.tokenizer.decode(token_ids, skip_special_tokens=True))

            engine = builtin_engine(
                policy, max_rows=config.rollout.max_rows, settings=config.engine, decode=decode
            )
            rollout = replace(
                config.rollout, temperature=sampled.temperature, max_new_tokens=sampled.max_new_tokens
            )
            sampling = sampling_of(rollout, policy)
            for start in range(whole, len(rows), sampled.batch):
                part = prompts[start : start + sampled.batch]
                made = engine.generate([p.token_ids for p in part], 1, sampling, sampled.seed + start)
                lines = "".join(
                    json.dumps(
                        {
                            "prompt": prompt.plain,
                            **{name: prompt.columns.get(name) for name in ("kind", "source")},
                            "completion": decode(completion.token_ids),
                            "tokens": len(completion.token_ids),
                            "finish_reason": completion.finish_reason,
                        }
                    )
                    + "\n"
                    for prompt, completion in zip(part, made, strict=True)
                )
                with path.open("a", encoding="utf-8") as file:
                    file.write(lines)
                tell(f"{when} training: {start + len(part):,} of {len(rows):,} completions")
            engine.close()
            del policy, engine, decode
            _free(device)
        found[when] = [row["completion"] for row in read_rows(path)]
    return found


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
