"""What a policy does on held-out prompts, and how sure one can be that it changed.

Letters: n prompts, R objectives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config.settings import TrainConfig
from grpo_fast.engines.base import RolloutEngine
from grpo_fast.run.shapes import is_finite
from grpo_fast.task import Task
from grpo_fast.typed import is_dict, is_list, rows


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One sampled reply per held-out prompt, with its scores."""

    names: list[str]
    completions: list[str]  # (n)
    finish_reasons: list[str]  # (n)
    rewards: list[list[float | None]]  # (n, R)
    judged: list[dict[str, float]] | None  # (n)

    @classmethod
    def of(cls, saved: Any) -> "Evaluation":
        """From what `asdict` gave, read back from JSON; ValueError for anything else."""
        if not is_dict(saved) or saved.keys() != {field.name for field in fields(cls)}:
            raise ValueError("not the fields of an evaluation")
        names, size = saved["names"], len(_list_of(saved["completions"], str))
        _list_of(names, str)
        _list_of(saved["finish_reasons"], str)
        judged = saved["judged"]
        for row in [
            *saved["rewards"],
            *(list(scores.values()) for scores in judged or ()),
        ]:
            if not all(value is None or is_finite(value) for value in row):
                raise ValueError("scores that are no numbers")
        if any(len(row) != len(names) for row in saved["rewards"]) or any(
            len(part) != size
            for part in (saved["finish_reasons"], saved["rewards"], judged)
            if part is not None
        ):
            raise ValueError("lists of different lengths")
        return cls(**saved)

    def reward(self, name: str) -> Tensor:
        """Rewards (n,) float64 of one objective, NaN where missing."""
        column = self.names.index(name)
        return torch.tensor([_nan(row[column]) for row in self.rewards], dtype=torch.float64)

    def judge(self, name: str) -> Tensor | None:
        """The judge's scores (n,) float64 under `name`, NaN where it gives none; None without a judge."""
        if self.judged is None or not any(name in scores for scores in self.judged):
            return None
        return torch.tensor([_nan(scores.get(name)) for scores in self.judged], dtype=torch.float64)


def _list_of(value: Any, kind: type) -> list[Any]:
    if not is_list(value) or not all(type(item) is kind for item in value):
        raise ValueError(f"not a list of {kind.__name__}")
    return value


def evaluate(task: Task, engine: RolloutEngine, config: TrainConfig, *, seed: int) -> Evaluation:
    """Sample one completion per held-out prompt, with the same random numbers whenever the seed is, and score it.

    On several processes each takes its share of the prompts, and all have the whole in the end.
    """
    share = task.policy.world.share(len(task.heldout))
    prompts = [task.heldout[place] for place in share]

    def measured() -> dict[str, Any]:
        token_ids = [prompt.token_ids for prompt in prompts]
        completions = engine.generate(token_ids, 1, task.sampling, seed, places=share)
        texts = [task.decode(completion.token_ids) for completion in completions]
        rewards = task.scorer(
            prompts, texts, [len(completion.token_ids) for completion in completions]
        ).rewards
        judge = task.judge
        return {
            "completions": texts,
            "finish_reasons": [completion.finish_reason for completion in completions],
            "rewards": [[None if math.isnan(value) else value for value in row] for row in rows(rewards)],
            "judged": [judge(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
            if judge
            else [],
        }

    parts = task.policy.world.agreed(measured)
    joined: dict[str, Any] = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    joined["judged"] = joined["judged"] or None
    return Evaluation(names=list(task.scorer.names), **joined)


def means(evaluation: Evaluation) -> dict[str, float]:
    """Mean reward and judged score of each objective, and over-refusal, under their names in metrics.jsonl."""
    result = {f"eval/reward/{name}": evaluation.reward(name).nanmean().item() for name in evaluation.names}
    for name in (*evaluation.names, "refusal"):
        if (judged := evaluation.judge(name)) is not None:
            result[f"eval/judge/{name}"] = judged.nanmean().item()
    return result


def mean_with_interval(values: Tensor) -> dict[str, Any]:
    """Mean of the finite values and its 95% interval, ±1.96 standard errors."""
    values = values[~values.isnan()]
    mean = values.mean().item()
    half = 1.96 * (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def compare(before: Evaluation, after: Evaluation, weights: Sequence[float]) -> dict[str, Any]:
    """The evaluation part of summary.json. Changes are paired: the same prompts before and after."""

    def entry(old: Tensor | None, new: Tensor | None, name: str) -> dict[str, Any]:
        if old is None or new is None:
            return {f"{name}_before": None, f"{name}_after": None, f"{name}_change": None}
        return {
            f"{name}_before": mean_with_interval(old),
            f"{name}_after": mean_with_interval(new),
            f"{name}_change": mean_with_interval(new - old),
        }

    objectives: dict[str, Any] = {}
    judge_changes: list[Tensor] = []
    for name, weight in zip(before.names, weights, strict=True):
        old, new = before.judge(name), after.judge(name)
        objectives[name] = {
            "weight": weight,
            **entry(before.reward(name), after.reward(name), "reward"),
            **entry(old, new, "judge"),
        }
        if old is not None and new is not None:
            judge_changes.append(new - old)
    old, new = before.judge("refusal"), after.judge("refusal")
    refusal = None
    if old is not None and new is not None:
        refusal = {
            "before": mean_with_interval(old),
            "after": mean_with_interval(new),
            "change": mean_with_interval(new - old),
            "prompts": int((~old.isnan()).sum()),
        }
    return {
        "objectives": objectives,
        "mean_judge_change": mean_with_interval(torch.stack(judge_changes).mean(0))
        if judge_changes
        else None,
        "over_refusal": refusal,
        "prompts": len(before.completions),
    }


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
