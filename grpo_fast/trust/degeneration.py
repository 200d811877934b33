"""Signs that a policy degenerates: rewards that fall back, groups that are all alike, lengths that run away, entropy
that is used up, outputs that repeat.

Each compares the mean of the last WINDOW steps with the run's own start, or with its last RECENT steps where a slow
change is what one trains for. That entropy which is used up stops all progress: Cui et al., arXiv 2505.22617.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from grpo_fast.trust.history import WINDOW, History, Row, Series, mean

RECENT = 25
"""Steps within which a length that doubles has exploded; over hundreds of steps it may have been learned."""
DROP = 0.5
"""Standard deviations (of the first groups' rewards) by which rewards must have fallen: a window's mean is uncertain by
about 0.1 at 16 prompts a step."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One sign: where the last window of a metric is `broken(against, now)`."""

    metric: str
    against: Literal["start", "lowest", "highest"]
    """The first window's mean, or the lowest or highest of the last RECENT steps"""
    broken: Callable[[float, float], bool]
    sentence: str
    """With {now}, {against} and {began}: the two means and the first step of the stretch"""


RULES: dict[str, Rule] = {
    "length_explosion": Rule(
        metric="length_mean",
        against="lowest",
        broken=lambda low, now: now > 2 * low and now > low + 16,
        sentence="completions grow fast, from {against:.0f} to {now:.0f} tokens, since step {began}: look whether they "
        "still end (samples.jsonl); a reward for length may be behind it (reward.overlong_buffer shapes against it)",
    ),
    "length_collapse": Rule(
        metric="length_mean",
        against="highest",
        broken=lambda high, now: now < high / 3,
        sentence="completions have shrunk from {against:.0f} to {now:.1f} tokens since step {began}: the rewards may "
        "prefer saying nothing; try loss.aggregation token_mean, a lower optim.lr or an objective against it",
    ),
    "truncated": Rule(
        metric="truncated_frac",
        against="start",
        broken=lambda _, now: now > 0.8,
        sentence="{now:.0%} of the completions are cut off ({against:.0%} in the first steps) since step {began}: "
        "raise rollout.max_new_tokens, or shape against length (reward.overlong_buffer)",
    ),
    "entropy_collapse": Rule(
        metric="entropy",
        against="start",
        broken=lambda start, now: now < max(0.01, 0.1 * start),
        sentence="the policy's entropy has collapsed to {now:.3g} nats a token from {against:.3g} since step {began}: "
        "it explores no more; raise loss.clip_high, loss.entropy_coef or rollout.temperature, or lower optim.lr",
    ),
    "entropy_explosion": Rule(
        metric="entropy",
        against="start",
        broken=lambda start, now: now > 2 * start + 1,
        sentence="the policy's entropy has risen to {now:.3g} nats a token from {against:.3g} since step {began}: "
        "it nears random text; lower optim.lr, or raise loss.kl_coef",
    ),
    "drift": Rule(
        metric="kl",
        against="start",
        broken=lambda _, now: now > 1,
        sentence="the policy has gone {now:.2g} nats a token away from its reference since step {began}: lower "
        "optim.lr, raise loss.kl_coef, and see whether the completions still make sense (limits.kl ends a run)",
    ),
    "flat_groups": Rule(
        metric="flat_groups_frac",
        against="start",
        broken=lambda _, now: now > 0.9,
        sentence="in {now:.0%} of the groups all completions score alike ({against:.0%} in the first steps) since step "
        "{began}: hardly anything is learned; take harder prompts, rollout.refill or a larger rollout.group_size",
    ),
    "duplicates": Rule(
        metric="duplicate_frac",
        against="start",
        broken=lambda start, now: now > max(0.5, start + 0.3),
        sentence="{now:.0%} of the completions repeat another of their group ({against:.0%} in the first steps) since "
        "step {began}: raise rollout.temperature or loss.entropy_coef, or lower optim.lr",
    ),
    "loops": Rule(
        metric="repetition",
        against="start",
        broken=lambda start, now: now > max(0.3, start + 0.15),
        sentence="{now:.0%} of the completions' text repeats itself ({against:.0%} in the first steps) since step "
        "{began}: the policy goes round in loops, which a reward may favour; lower optim.lr, or raise loss.kl_coef",
    ),
}


def signs(rows: Sequence[Row], weights: Mapping[str, float] | None = None) -> dict[str, str]:
    """What the last steps of `rows` (metrics, the first step first) show: name -> sentence. Empty when all is well.

    `weights`: of the objectives, negative where lower is better (default 1 each). Needs two windows of steps.
    """
    return signs_of(History(rows, weights=weights))


def signs_of(history: History, *, said: Collection[str] = ()) -> dict[str, str]:
    """`signs` of a history that grows, without those that were `said`."""
    found: dict[str, str] = {}
    if history.steps < 2 * WINDOW:
        return found
    for name, rule in RULES.items():
        series = history.series(rule.metric)
        if name in said or series.count < 2 * WINDOW:
            continue
        now = series.means[-1]
        against = _against(series, rule.against)
        if rule.broken(against, now):
            began = _began(series, lambda value, rule=rule, against=against: rule.broken(against, value))
            found[name] = rule.sentence.format(now=now, against=against, began=began)
    if "reward_collapse" not in said:
        found |= _collapse(history.progress)
    if "no_spread" not in said:
        found |= _no_spread(history)
    return found


def _collapse(series: Series) -> dict[str, str]:
    if len(series.means) <= WINDOW:
        return {}
    now = series.means[-1]
    best, step = series.highest[-1 - WINDOW]  # of the windows before the last one
    if not (now < -DROP or (best - now > DROP and now < best / 3)):
        return {}
    return {
        "reward_collapse": f"the rewards have fallen back to {now:+.2f} standard deviations against the start, from "
        f"{best:+.2f} at step {step}: go back to a checkpoint before that, with a lower "
        "optim.lr or a higher loss.kl_coef"
    }


def _no_spread(history: History) -> dict[str, str]:
    shares = [
        series.means[-1] / start
        for series in (history.series(key) for key in history.last if key.startswith("group_std/"))
        if series.count >= 2 * WINDOW and (start := mean(series.start)) > 0
    ]
    share = mean(list(enumerate(shares)))
    if not shares or share >= 0.05:
        return {}
    return {
        "no_spread": f"completions of one prompt differ in reward by {share:.0%} of what they did: their comparison is "
        "mostly noise by now; stop here, or take harder prompts"
    }


def _against(series: Series, against: str) -> float:
    if against == "start":
        return mean(series.start)
    recent = series.last(RECENT)[:-WINDOW]
    means = [mean(recent[i : i + WINDOW]) for i in range(max(1, len(recent) - WINDOW + 1))]
    return min(means) if against == "lowest" else max(means)


def _began(series: Series, broken: Callable[[float], bool]) -> int:
    """The first step of the last stretch in which every step is broken by itself, or of the last window."""
    began = series.latest[-WINDOW][0]
    for step, value in reversed(series.latest):
        if not broken(value):
            break
        began = min(began, step)
    return began
