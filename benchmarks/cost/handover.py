"""What a peer is given to train on (pairs and prompts as token ids, the reward model with one output), and its run."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_fast.errors import UserError
from grpo_fast.models.reward_backbone import linear_score
from grpo_fast.models.reward_model import RewardModel

PEERS = Path(__file__).parents[1] / "peers"


@dataclass(frozen=True, kw_only=True)
class TokenPair:
    """Two completions of one prompt, as token ids with their end tokens."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def write_pairs(pairs: Iterable[TokenPair], path: Path) -> None:
    """One pair a line, as JSON."""
    _write_lines((asdict(pair) for pair in pairs), path)


def read_pairs(path: Path) -> list[TokenPair]:
    """The pairs `write_pairs` wrote, in their order."""
    with path.open(encoding="utf-8") as lines:
        return [TokenPair(**json.loads(line)) for line in lines]


def write_prompts(prompts: Iterable[Sequence[int]], path: Path) -> None:
    """One prompt a line, a JSON list of its token ids."""
    _write_lines((list(ids) for ids in prompts), path)


def _write_lines(rows: Iterable[object], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def with_one_output(model: RewardModel, weights: Tensor) -> tuple[PreTrainedModel, float]:
    """A copy of the classifier whose only output, plus the constant, is the weighted sum of the heads' scores.

    `weights` (R,) as in `Scorer.weights`. The constant is apart because the architectures' `score` has no bias.
    UserError for a head that is not linear in its output (binary, ordinal) and for an ensemble: no single row of
    weights gives those.
    """
    heads = model.heads
    bent = [head.name for head in heads if head.kind not in ("regression", "pairwise")]
    if bent or model.layout.members > 1 or model.layout.gaussian:
        why = f"the scores of {', '.join(bent)} are not linear" if bent else "it has several outputs a head"
        raise UserError(
            f"reward model: {why}, so one output cannot stand for it; train it with regression heads"
        )
    score = linear_score(model.model)
    scale = weights.double() * torch.tensor([head.std for head in heads], dtype=torch.float64)
    constant = float(weights.double() @ torch.tensor([head.mean for head in heads], dtype=torch.float64))
    if score.bias is not None:
        constant += float(scale @ score.bias.detach().double().cpu())
    single = copy.deepcopy(model.model)
    row = (scale.to(score.weight.device) @ score.weight.detach().double()).to(score.weight.dtype)
    single.score = nn.Linear(score.in_features, 1, bias=False, device=row.device, dtype=row.dtype)
    with torch.no_grad():
        single.score.weight.copy_(row[None])
    single.config.num_labels = 1
    single.config.id2label, single.config.label2id = {0: "reward"}, {"reward": 0}
    return single, constant


def run_peer(python: str, script: str, spec: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """`benchmarks/peers/<script> SPEC` in another Python, to its end: everything it answered, and its `status`.

    `status` is "finished", or "failed" with the last line of its errors in `why`; without a Python, "not measured".
    """
    if not python:
        return {"status": "not measured", "why": "no Python with this peer was given"}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # the peer's packages are its own
    try:
        done = subprocess.run(
            [python, str(PEERS / script), json.dumps(spec)], capture_output=True, text=True, env=environment
        )
    except OSError as error:
        return {"status": "failed", "why": f"{python}: {error.strerror}"}
    found: dict[str, Any] = {"status": "finished"}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["ended without a word"]
        found |= {"status": "failed", "why": lines[-1]}
    return found
