"""From prompts to a step's training data: completions, the reward matrix, advantages.

Letters: P prompts, G completions a prompt, S = P·G sequences, R objectives.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from grpo_kernels import group_advantages
from torch import Tensor

from grpo_fast.config.resolve import advantage_choice, overlaps
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.base import Completion, RolloutEngine
from grpo_fast.rollout_codec import Answers
from grpo_fast.scoring import Scored, Scorer, Scoring
from grpo_fast.task import Task
from grpo_fast.trust.repetition import repeated
from grpo_fast.typed import booleans

Timer = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One step's sequences, group after group."""

    prompts: list[Prompt]  # (P)
    prompt_of: list[int]  # (S) index into prompts
    completions: list[Completion]  # (S)
    texts: list[str]  # (S)
    scored: Scored
    advantages: Tensor  # (S,) float32

    @property
    def answers(self) -> Answers:
        """All that was answered."""
        return Answers(completions=self.completions, texts=self.texts, scored=self.scored)

    @property
    def rewards(self) -> Tensor:
        """(S, R) float32, as the reward sources gave them."""
        return self.scored.rewards

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of the P prompts."""
        return [prompt.token_ids for prompt in self.prompts]

    @property
    def tokens(self) -> int:
        """Tokens of all completions."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def flat(self) -> list[bool]:
        """(P,) groups whose completions all have the advantage 0: nothing can be learned from them."""
        return booleans((self.advantages.view(len(self.prompts), -1) == 0).all(1))


def collect(
    prompts: list[Prompt],
    task: Task,
    engine: RolloutEngine,
    config: TrainConfig,
    *,
    weights: Tensor,
    seed: int,
    timer: Timer,
) -> Rollout:
    """Sample a group of completions for each prompt, score them and compare them within their group.

    `weights` (R,): the objectives' weights in this step. Groups are handed to the scorer as they are finished. On
    several processes each answers its share of the prompts, and all have the same rollout in the end.
    """
    world = task.policy.world
    share = world.share(len(prompts))

    def answered() -> Answers:
        return _answers(prompts, share, task, engine, config, seed=seed, timer=timer)

    if world.size == 1:
        answers = answered()
    else:
        # there may be fewer prompts than processes
        parts = world.exchanged(lambda: answered().to_bytes() if share else b"", aside=config.rollout.ahead)
        answers = reduce(add, [Answers.from_bytes(part) for part in parts if part])
    return _rollout(prompts, answers, task.scorer, config, weights)


def _answers(
    every_prompt: list[Prompt],
    share: range,
    task: Task,
    engine: RolloutEngine,
    config: TrainConfig,
    *,
    seed: int,
    timer: Timer,
) -> Answers:
    """The answers to this process's share of the prompts."""
    group_size = config.rollout.group_size
    prompts = [every_prompt[place] for place in share]
    texts = [""] * (len(prompts) * group_size)
    with Scoring(task.scorer, overlap=overlaps(config, task.policy.device)) as scoring:

        def finished(prompt: int, group: list[Completion]) -> None:
            places = range(prompt * group_size, (prompt + 1) * group_size)
            decoded = [task.decode(completion.token_ids) for completion in group]
            texts[places.start : places.stop] = decoded
            lengths = [len(completion.token_ids) for completion in group]
            scoring.put(places, [prompts[prompt]] * group_size, decoded, lengths)

        with timer("generate"):
            token_ids = [prompt.token_ids for prompt in prompts]
            completions = engine.generate(
                token_ids, group_size, task.sampling, seed, places=share, on_group=finished
            )
        with timer("reward"):
            scored = scoring.result()
    return Answers(completions=completions, texts=texts, scored=scored)


def _rollout(
    prompts: list[Prompt],
    answers: Answers,
    scorer: Scorer,
    config: TrainConfig,
    weights: Tensor,
) -> Rollout:
    mode, scale = advantage_choice(config)
    group_size = config.rollout.group_size
    advantages = group_advantages(
        scorer.used(answers.scored),
        group_size=group_size,
        weights=weights,
        mode=mode,
        scale=scale,
        std_floor=config.advantage.std_floor,
    )
    return rollout_of(prompts, answers, advantages)


def rollout_of(prompts: list[Prompt], answers: Answers, advantages: Tensor) -> Rollout:
    """The rollout of whole groups, as many completions to each prompt."""
    group_size = len(answers.completions) // len(prompts)
    return Rollout(
        prompts=prompts,
        prompt_of=[index for index in range(len(prompts)) for _ in range(group_size)],
        completions=answers.completions,
        texts=answers.texts,
        scored=answers.scored,
        advantages=advantages,
    )


def refilled(
    rollout: Rollout, more: Rollout, scorer: Scorer, config: TrainConfig, weights: Tensor
) -> Rollout:
    """As many groups as `rollout` has: those with signal of both, then, where they do not suffice, flat ones.

    Advantages are compared anew, since some are scaled by the whole batch.
    """
    count, group_size = len(rollout.prompts), config.rollout.group_size
    flat = [*rollout.flat, *more.flat]
    groups = sorted(range(len(flat)), key=lambda group: flat[group])[:count]
    rows = [group * group_size + sample for group in groups for sample in range(group_size)]
    prompts = [*rollout.prompts, *more.prompts]
    both = rollout.answers + more.answers
    chosen = Answers(
        completions=[both.completions[row] for row in rows],
        texts=[both.texts[row] for row in rows],
        scored=both.scored.rows(rows),
    )
    return _rollout([prompts[group] for group in groups], chosen, scorer, config, weights)


def rollout_metrics(rollout: Rollout, names: Sequence[str], group_size: int) -> dict[str, float]:
    """Means and spreads of one rollout under the names that metrics.jsonl and the report use."""
    metrics: dict[str, float] = {}
    for column, name in enumerate(names):
        values = rollout.rewards[:, column]
        observed = values[~values.isnan()]
        if len(observed) < 2:
            continue
        metrics[f"reward/{name}"] = observed.mean().item()
        metrics[f"reward_sem/{name}"] = (observed.std() / len(observed) ** 0.5).item()
        groups = values.view(-1, group_size)
        spread = (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
        metrics[f"group_std/{name}"] = spread.nanmean().item()
        unsure = rollout.scored.spread[:, column]
        if not unsure.isnan().all():
            metrics[f"spread/{name}"] = unsure.nanmean().item()
    if rollout.scored.outside is not None and rollout.scored.distance is not None:
        metrics["outside_frac"] = rollout.scored.outside.float().mean().item()
        metrics["distance"] = rollout.scored.distance.mean().item()
    if rollout.scored.unscored:
        metrics["unscored"] = float(rollout.scored.unscored)
    if rollout.scored.truncated:
        metrics["truncated_prompts"] = float(rollout.scored.truncated)
    lengths = torch.tensor(
        [len(completion.token_ids) for completion in rollout.completions], dtype=torch.float32
    )
    cut = sum(completion.finish_reason == "length" for completion in rollout.completions)
    flat = (rollout.advantages.view(-1, group_size) == 0).all(1).float().mean().item()
    return {
        **metrics,
        **repeated([completion.token_ids for completion in rollout.completions], group_size),
        "length_mean": lengths.mean().item(),
        "length_max": lengths.max().item(),
        "truncated_frac": cut / len(lengths),
        "flat_groups_frac": flat,
        "generated_tokens": float(rollout.tokens),
    }
