"""Every objective's reward of every completion: reward models, a judge on a server, the user's functions, its length.

Letters: S sequences, R objectives, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_fast.config.settings import RewardSettings
from grpo_fast.data.prompts import Prompt
from grpo_fast.errors import UserError
from grpo_fast.models.reward_model import Prediction
from grpo_fast.models.reward_set import RewardSet
from grpo_fast.rewards.functions import RewardFunctions, combine_names, objective_weights, with_messages
from grpo_fast.rewards.overlong import Overlong

if TYPE_CHECKING:
    from grpo_fast.rewards.http_judge import HttpJudge


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Rewards of S completions on R objectives, on the CPU."""

    rewards: Tensor
    """(S, R) float32, NaN where missing"""
    spread: Tensor
    """(S, R) float32: how unsure a reward model is, in the reward's unit; NaN where nothing says"""
    distance: Tensor | None = None
    """(S,) float32: how far from the reward model's training replies, in units of a typical held-out reply's distance;
    None where that was not measured"""
    outside: Tensor | None = None
    """(S,) bool: whether 95% of held-out replies are nearer"""
    truncated: int = 0
    """Completions whose prompt lost its beginning to a reward model's length limit"""
    unscored: int = 0
    """Completions that were too long for a reward model by themselves: their scores are missing"""

    def rows(self, index: list[int]) -> Scored:
        """The scores of some completions; the two counts stay those of all."""
        tensors = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def joined(first: Scored, second: Scored) -> Scored:
    """The scores of two batches, one after the other."""

    def together(name: str) -> Tensor | None:
        parts = [getattr(first, name), getattr(second, name)]
        return None if None in parts else torch.cat(parts)

    return Scored(
        rewards=torch.cat([first.rewards, second.rewards]),
        spread=torch.cat([first.spread, second.spread]),
        distance=together("distance"),
        outside=together("outside"),
        truncated=first.truncated + second.truncated,
        unscored=first.unscored + second.unscored,
    )


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores completions on every objective: reward models' heads, the judge's rubrics, functions, overlong."""

    names: list[str]  # R objectives, the reward matrix's columns
    weights: Tensor  # (R,) float32, signed: negative where lower is better
    settings: RewardSettings
    models: RewardSet | None
    judge: HttpJudge | None
    functions: RewardFunctions | None
    overlong: Overlong | None
    token_budget: int

    @classmethod
    def create(
        cls,
        settings: RewardSettings,
        models: RewardSet | None,
        functions: RewardFunctions | None,
        judge: HttpJudge | None = None,
        *,
        overlong: Overlong | None = None,
        token_budget: int = 16384,
    ) -> Scorer:
        """Join the sources; `functions` have been probed, so their values have names.

        UserError where names clash, a setting names no objective, or a lower bound is asked of a head without spread.
        """
        heads = models.names if models else []
        names = combine_names(
            heads,
            judge.names if judge else [],
            (functions.names or []) if functions else [],
            overlong is not None,
        )
        check_spread(settings, models.with_spread if models else [], names)
        lower = [head.name for head in models.heads if head.better == "low"] if models else []
        return cls(
            names=names,
            weights=objective_weights(names, settings, lower),
            settings=settings,
            models=models,
            judge=judge,
            functions=functions,
            overlong=overlong,
            token_budget=token_budget,
        )

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], lengths: Sequence[int] | None = None
    ) -> Scored:
        """Score completion i, of `lengths[i]` tokens, as the answer to prompt i."""
        with Scoring(self) as scoring:
            scoring.put(list(range(len(prompts))), prompts, completions, lengths)
            return scoring.result()

    def doubts(self) -> list[str]:
        """Heads that were found weak or untrustworthy when their reward model was measured, one line each."""
        heads = self.models.heads if self.models else []
        return [f"{h.name} was found {h.verdict}" for h in heads if h.verdict in ("weak", "untrustworthy")]

    def counts(self) -> dict[str, float]:
        """The judge's requests, retries, cache hits and unusable answers, and functions' failures, since the start."""
        judged = {f"judge/{name}": float(n) for name, n in self.judge.stats.items()} if self.judge else {}
        return judged | (self.functions.counts() if self.functions else {})

    def used(self, scored: Scored) -> Tensor:
        """(S, R): the rewards that are compared, where a lower bound or a threshold takes the score's place."""
        rewards = scored.rewards.clone()
        for name, k in self.settings.lower_bounds.items():
            column = self.names.index(name)
            # Unsure is worse, whichever direction is better.
            rewards[:, column] -= torch.copysign(scored.spread[:, column] * k, self.weights[column])
        for name, threshold in self.settings.thresholds.items():
            column = self.names.index(name)
            passed = (rewards[:, column] >= threshold).float()
            rewards[:, column] = torch.where(rewards[:, column].isnan(), torch.nan, passed)
        return rewards


def check_spread(settings: RewardSettings, with_spread: Sequence[str], names: Sequence[str]) -> None:
    """UserError where a lower bound is asked of an objective that nothing gives a spread."""
    for name in settings.lower_bounds:
        if name in names and name not in with_spread:
            raise UserError(
                f"reward.lower_bounds names {name}, which has no spread: give a reward model that was trained with "
                "--backbone.members 2 or more, or several checkpoints with the same heads"
            )


class Scoring:
    """The scoring of one batch, which can begin while completions are still generated; a context manager.

    What is put in waits until it fills the reward models' token budget, so which completions are read together
    depends on the order of `put` alone, and never on how fast anything is. With `overlap` the models run in a thread
    of their own, on a CUDA stream of their own; a judge's requests leave at once either way. Python functions see the
    whole batch, at the end.
    """

    def __init__(self, scorer: Scorer, *, overlap: bool = False) -> None:
        self._scorer = scorer
        self._models = ThreadPoolExecutor(max_workers=1)  # one at a time: a model is no place for two threads
        self._functions = ThreadPoolExecutor(max_workers=1)
        self._overlap = overlap
        self._rows: list[tuple[int, Prompt, str]] = []
        self._waiting: list[tuple[int, Prompt, str]] = []
        self._waiting_size = 0
        self._parts: list[tuple[list[int], Future[Prediction] | list[tuple[int, Prompt, str]]]] = []
        self._judged: dict[int, list[Future[float]]] = {}
        self._lengths: dict[int, int] = {}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._models, self._functions):
            pool.shutdown(wait=False, cancel_futures=True)

    def put(
        self,
        places: Sequence[int],
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Completions of whole groups, their places in the batch, and (for `overlong`) their lengths in tokens."""
        rows = list(zip(places, prompts, completions, strict=True))
        self._rows += rows
        if self._scorer.overlong:
            if lengths is None:
                raise ValueError("the objective overlong needs the completions' lengths in tokens")
            self._lengths |= dict(zip(places, lengths, strict=True))
        if self._scorer.judge:
            for place, prompt, completion in rows:
                asked = prompt.messages or prompt.text
                self._judged[place] = self._scorer.judge.submit(asked, completion)
        if self._scorer.models:
            self._waiting += rows
            # A group's prompt is read once; four characters a token is near enough to fill a budget.
            texts = {prompt.text for prompt in prompts}
            self._waiting_size += sum(map(len, texts)) + sum(map(len, completions))
            if self._waiting_size >= 4 * self._scorer.token_budget:
                self._send()

    def _send(self) -> None:
        if self._waiting:
            rows, self._waiting, self._waiting_size = self._waiting, [], 0
            work = self._models.submit(self._predict, rows) if self._overlap else rows
            self._parts.append(([place for place, _, _ in rows], work))

    def _predict(self, rows: list[tuple[int, Prompt, str]]) -> Prediction:
        models = self._scorer.models
        assert models is not None
        device = models.ensembles[0][0].device
        stream = torch.cuda.Stream(device) if device.type == "cuda" and self._overlap else None
        with torch.cuda.stream(stream):
            asked = [prompt.messages or prompt.text for _, prompt, _ in rows]
            return models.predict(
                asked,
                [text for _, _, text in rows],
                self._scorer.token_budget,
                calibrated=self._scorer.settings.calibrated,
            )

    def result(self) -> Scored:
        """Everything that was put in, in the order of its places."""
        scorer, rows = self._scorer, sorted(self._rows, key=lambda row: row[0])
        running = None
        if scorer.functions:
            prompts = [prompt for _, prompt, _ in rows]
            columns = [with_messages(prompt.columns, prompt.messages) for prompt in prompts]
            texts = [prompt.plain for prompt in prompts]
            running = self._functions.submit(scorer.functions, texts, [text for _, _, text in rows], columns)
        size, heads = len(rows), len(scorer.models.names) if scorer.models else 0
        scores, spread = torch.empty(size, heads), torch.empty(size, heads)
        distance, outside = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
        truncated = unscored = 0
        measured = False
        self._send()
        for places, work in self._parts:
            part = work.result() if isinstance(work, Future) else self._predict(work)
            assert part.spread is not None
            scores[places], spread[places] = part.scores, part.spread
            truncated += part.truncated
            unscored += part.unscored
            if part.outside is not None and part.distance is not None:
                distance[places], outside[places], measured = part.distance, part.outside, True
        columns_of = [scores]
        if scorer.judge:
            columns_of.append(scorer.judge.collect([self._judged[place] for place, _, _ in rows]))
        if running:
            columns_of.append(running.result())
        if scorer.overlong:
            columns_of.append(scorer.overlong([self._lengths[place] for place, _, _ in rows]))
        rewards = torch.cat(columns_of, dim=1)
        nothing = torch.full((size, rewards.shape[1] - heads), torch.nan)
        return Scored(
            rewards=rewards,
            spread=torch.cat([spread, nothing], dim=1),
            distance=distance if measured else None,
            outside=outside if measured else None,
            truncated=truncated,
            unscored=unscored,
        )
