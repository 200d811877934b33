"""How good a policy has become, asked off the clock: the one place that knows the judge.

Letters: n held-out prompts, R objectives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.base import Completion, RolloutEngine
from grpo_fast.packing import pack
from grpo_fast.task import Task


class Examiner:
    """Samples one completion of every held-out prompt, with the same random numbers each time, and rates them."""

    def __init__(self, task: Task, engine: RolloutEngine, config: TrainConfig) -> None:
        self._task, self._engine, self._config = task, engine, config
        self._start = None if task.policy.is_lora else task.policy.frozen_copy().to("cpu")
        self.gains: Tensor | None = None
        """(n) what each held-out prompt's quality has gained since the first time"""
        self._before: Tensor | None = None
        # (R,) each: the start policy's mean rewards, and their standard deviations
        self._scale: tuple[Tensor, Tensor] | None = None
        self._version = 1 << 40  # of the weights: none that a step has

    def __call__(self) -> dict[str, Any]:
        """The entries of the curve that say how good the policy is, as it is now.

        `judge` and `reward`: means by objective; without a judge the rewards stand for it, turned so that more is
        better and in standard deviations of the start policy's, and so does `score`, their weighted mean, always;
        `mean` and `worst` of the judge's; `over_refusal`: share of prompts that should be answered and are refused;
        `distinct`: distinct pairs of neighbouring tokens over all pairs; `kl`: nats a completion from the start policy,
        estimated on these completions; `length` in tokens.
        """
        task, config = self._task, self._config
        was_training = task.policy.training
        self._version += 1
        self._engine.push(task.policy.named_weights(), self._version)
        asked = [prompt.token_ids for prompt in task.heldout]
        completions = self._engine.generate(asked, 1, task.sampling, config.seed << 32)
        texts = [task.decode(completion.token_ids) for completion in completions]
        lengths = [len(completion.token_ids) for completion in completions]
        scored = task.scorer(task.heldout, texts, lengths).rewards.double()  # (n, R)
        names = task.scorer.names
        found: dict[str, Any] = {"reward": dict(zip(names, scored.nanmean(0).tolist(), strict=True))}
        weights = task.scorer.weights.double()
        relative = self._relative(scored) * weights.sign()
        found["score"] = (relative.nanmean(0) * weights.abs()).nansum().item() / weights.abs().sum().item()
        rated = relative
        if task.judge:
            rated, refused = self._judged(texts)
            found["over_refusal"] = refused.nanmean().item()
        means = dict(zip(names, rated.nanmean(0).tolist(), strict=True))
        counts = [name for name, weight in zip(names, weights.tolist(), strict=True) if weight]
        found["judge"] = {name: means[name] for name in counts}
        quality = rated[:, weights != 0].nanmean(1)
        self._before = quality if self._before is None else self._before
        self.gains = quality - self._before
        found |= {
            "mean": sum(found["judge"].values()) / len(counts),
            "worst": min(found["judge"].values()),
            "distinct": distinct_pairs([completion.token_ids for completion in completions]),
            "kl": self._divergence(task.heldout, completions),
            "length": sum(lengths) / len(lengths),
        }
        task.policy.train(was_training)
        self._engine.sleep()  # what it holds for these prompts is not the algorithm's
        self._engine.wake()
        return found

    def _relative(self, scored: Tensor) -> Tensor:
        """(n, R): rewards less the start policy's mean, in its standard deviations."""
        if self._scale is None:
            mean = scored.nanmean(0)
            deviation = (scored - mean).square().nanmean(0).sqrt()
            self._scale = mean, torch.where(deviation > 0, deviation, 1.0)
        mean, deviation = self._scale
        return (scored - mean) / deviation

    def _judged(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(n, R) and (n,): scores by objective, and whether an answer was refused; NaN where it says nothing."""
        assert self._task.judge is not None
        scores = [
            self._task.judge(prompt, text) for prompt, text in zip(self._task.heldout, texts, strict=True)
        ]
        rows = [[row.get(name, float("nan")) for name in self._task.scorer.names] for row in scores]
        refused = [row.get("refusal", float("nan")) for row in scores]
        return torch.tensor(rows, dtype=torch.float64), torch.tensor(refused, dtype=torch.float64)

    @torch.no_grad()
    def _divergence(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> float:
        policy, total = self._task.policy, 0.0
        start = None if self._start is None else self._start.to(policy.device)
        batches = pack(
            [prompt.token_ids for prompt in prompts],
            [completion.token_ids for completion in completions],
            token_budget=self._config.optim.token_budget,
            share_prefix=policy.packed,
        )
        for batch in (batch.to(policy.device) for batch in batches):
            own = batch.gather([completion.logprobs for completion in completions])
            then, _ = (start or policy).logprobs(
                batch, temperature=self._config.rollout.temperature, reference=start is None
            )
            total += (own - then).double().sum().item()
        if start is not None:
            start.to("cpu")
        return total / len(completions)

    def worse(self) -> bool:
        """Whether quality on the held-out prompts has fallen below the start's by more than three standard errors."""
        if self.gains is None:
            return False
        gains = self.gains[~self.gains.isnan()]
        return bool(len(gains) > 1 and gains.mean() < -3 * gains.std() / len(gains) ** 0.5)


def distinct_pairs(completions: Iterable[Sequence[int]]) -> float:
    """Distinct pairs of neighbouring tokens over all such pairs (distinct-2, arXiv 1510.03055)."""
    pairs = [pair for ids in completions for pair in pairwise(ids)]
    return len(set(pairs)) / max(1, len(pairs))


def fingerprint(*things: nn.Module | Sequence[Prompt]) -> str:
    """The first half of a SHA-256 of every weight of modules, and of every token of prompts."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, nn.Module):
            for name, tensor in sorted(thing.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr([prompt.token_ids for prompt in thing]).encode())
    return digest.hexdigest()[:32]
