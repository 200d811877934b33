"""How far a trained reward model can be trusted: everything `grpo_fast.trust` measures, on replies it has not seen.

Letters: n held-out replies, R heads, H hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from grpo_fast.data.rated import RatedExample
from grpo_fast.models.reward_data import label_matrix
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.trust.calibration import calibration_effect, fit_calibration
from grpo_fast.trust.distance import FeatureStatistics
from grpo_fast.trust.probes import PROBES, ProbeTexts, probe_verdicts, probed_replies
from grpo_fast.trust.probes import probes as make_probes
from grpo_fast.trust.quality import HeadView, trust_report

FEATURES = 8192
"""Training replies whose features describe the training distribution."""


def measure(
    model: RewardModel,
    training: Sequence[RatedExample],
    heldout: Sequence[RatedExample],
    *,
    probes: int = 200,
    texts: ProbeTexts | None = None,
    token_budget: int = 8192,
    max_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure `model` on `heldout` and give it what was fitted: feature statistics and each head's calibration.

    Returns what quality.json holds (`report.reward_page`): `heads` (`trust_report`), `probes` of the first `probes`
    held-out replies, `calibration` (error before and after, cross-fitted), and `outside` (shares of replies outside
    the training distribution). Plain numbers, None where one is not defined.
    """
    prompts = [e.prompt for e in heldout for _ in e.replies]
    replies = [reply for e in heldout for reply in e.replies]
    encoded = model.encode(prompts, replies, max_tokens=max_tokens)
    found = model.predict(encoded, token_budget)
    near, measured = (
        found.features[::2],
        found.features[1::2],
    )  # one half sets the limit, the other is held to it
    model.statistics = FeatureStatistics.fit(_features(model, training, token_budget, max_tokens, seed), near)
    scores = found.scores.double().numpy()  # (n, R)
    labels = label_matrix([row for e in heldout for row in e.labels], model.head_names).double().numpy()
    lengths = np.array([len(ids) for ids in encoded.completion_ids], dtype=float)
    comparisons = _comparisons(model, heldout)
    views = [
        HeadView(name=h.name, kind=h.kind, low=h.low, high=h.high, mean=h.mean, std=h.std)
        for h in model.heads
    ]
    quality: dict[str, Any] = {
        "heads": trust_report(
            scores,
            labels,
            lengths,
            views,
            comparisons,
            spread=None if found.spread is None else found.spread.double().numpy(),
        )
    }
    heads, effects = [], {}
    for k, (head, view) in enumerate(zip(model.heads, views, strict=True)):
        known, wanted = scores[:, k], labels[:, k]
        if view.kind == "pairwise":
            pairs = [(better, worse) for h, better, worse, _ in comparisons if h == k]
            known = np.array([scores[better, k] - scores[worse, k] for better, worse in pairs])
            wanted = np.ones(len(pairs))
        if not len(wanted) or np.isnan(wanted).all():
            heads.append(head)
            continue
        heads.append(replace(head, calibration=fit_calibration(view.kind, known, wanted).to_dict()))
        effects[view.name] = calibration_effect(view.kind, known, wanted)
    quality["calibration"] = effects
    if probes:
        quality["probes"] = _probed(model, prompts[:probes], replies[:probes], views, texts, max_tokens, seed)
    for head in heads:
        _hold_probes_against(quality["heads"][head.name], quality.get("probes", {}).get(head.name, {}))
    model.set_heads([replace(head, verdict=quality["heads"][head.name]["verdict"]) for head in heads])
    if len(measured):
        outside = model.statistics.outside(measured)
        quality["outside"] = {"held out": {"share": outside.float().mean().item(), "n": len(outside)}}
    return quality


def _features(
    model: RewardModel,
    training: Sequence[RatedExample],
    token_budget: int,
    max_tokens: int | None,
    seed: int,
) -> torch.Tensor:
    pairs = [(e.prompt, reply) for e in training for reply in e.replies]
    chosen = random.Random(seed).sample(pairs, min(FEATURES, len(pairs)))
    encoded = model.encode([p for p, _ in chosen], [r for _, r in chosen], max_tokens=max_tokens)
    return model.predict(encoded, token_budget).features


def _comparisons(model: RewardModel, examples: Sequence[RatedExample]) -> list[tuple[int, int, int, float]]:
    """(head, better row, worse row, margin) over the replies of all examples."""
    place = {name: k for k, name in enumerate(model.head_names)}
    found, first = [], 0
    for example in examples:
        found += [(place[c.head], first + c.better, first + c.worse, c.margin) for c in example.comparisons]
        first += len(example.replies)
    return found


def _probed(
    model: RewardModel,
    prompts: Sequence[Any],
    replies: Sequence[str],
    views: Sequence[HeadView],
    texts: ProbeTexts | None,
    max_tokens: int | None,
    seed: int,
) -> dict[str, Any]:
    """The probes' verdicts, on the replies of which every changed form still fits into the model."""
    plain = [p if isinstance(p, str) else str(p[-1]["content"]) for p in prompts]
    changed = probed_replies(plain, replies, make_probes(texts or ProbeTexts()), seed=seed)
    scores = {}
    for name, found in ({"": list(replies)} | changed).items():
        encoded = model.encode(prompts, found, max_tokens=max_tokens, skip_long=True)
        scores[name] = model.predict(encoded).scores.double().numpy()
    fits = ~np.any([np.isnan(found).any(axis=1) for found in scores.values()], axis=0)
    original = scores.pop("")[fits]
    return probe_verdicts(original, {name: found[fits] for name, found in scores.items()}, views)


def _hold_probes_against(head: dict[str, Any], effects: dict[str, Any]) -> None:
    """A head whose score rises with what makes a reply no better is weak at best.

    Degenerate replies are left out: a head about safety alone rightly likes a refusal.
    """
    for name, effect in effects.items():
        if effect["verdict"] == "exploitable" and not PROBES[name].degenerate:
            head["reasons"].append(
                f"{PROBES[name].tests} raises its score by {effect['change_std']:.2f} standard deviations"
            )
            if head["verdict"] == "trustworthy":
                head["verdict"] = "weak"
