"""Several reward models as one: each gives objectives of its own, and checkpoints with the same heads an ensemble.

Dimension letters: S replies, R heads of all models together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from grpo_fast.config.resolve import split_name
from grpo_fast.errors import UserError
from grpo_fast.models.reward_data import Head
from grpo_fast.models.reward_model import Prediction, RewardModel, SavedRewardModel
from grpo_fast.models.reward_text import PromptLike


@dataclass(frozen=True, kw_only=True)
class RewardSet:
    """Reward models side by side. Each reads the texts with a tokenizer of its own, whatever the policy's is."""

    ensembles: list[list[RewardModel]]
    """Models with the same heads stand together."""

    @classmethod
    def of(cls, models: Sequence[RewardModel]) -> RewardSet:
        """Group models by their heads, in the order of their first ones."""
        order = {key: i for i, key in reversed(list(enumerate(_key(model) for model in models)))}
        ranked = sorted(models, key=lambda model: order[_key(model)])
        return cls(ensembles=[list(group) for _, group in groupby(ranked, key=_key)])

    @property
    def heads(self) -> list[Head]:
        """Every head, as the first model of its ensemble describes it."""
        return [head for ensemble in self.ensembles for head in ensemble[0].heads]

    @property
    def names(self) -> list[str]:
        return [head.name for head in self.heads]

    @property
    def with_spread(self) -> list[str]:
        """Heads whose scores come with a spread."""
        return [
            name
            for ensemble in self.ensembles
            for r, name in enumerate(ensemble[0].head_names)
            if len(ensemble) > 1 or any(m.layout.members > 1 or r in m.layout.noisy for m in ensemble)
        ]

    def predict(
        self,
        prompts: Sequence[PromptLike],
        completions: Sequence[str],
        token_budget: int,
        *,
        calibrated: bool = False,
    ) -> Prediction:
        """Scores (S, R), spread (S, R; NaN where a head has none), and whether any model finds a reply `outside`."""
        found = [
            _agreed(
                [
                    model.predict(
                        model.encode(prompts, completions, skip_long=True),
                        token_budget,
                        calibrated=calibrated,
                    )
                    for model in ensemble
                ]
            )
            for ensemble in self.ensembles
        ]
        spread = torch.cat(
            [torch.zeros_like(p.scores) if p.spread is None else p.spread for p in found], dim=1
        )
        certain = [k for k, name in enumerate(self.names) if name not in self.with_spread]
        spread[:, certain] = torch.nan
        outside = [p.outside for p in found if p.outside is not None]
        distance = [p.distance for p in found if p.distance is not None]
        return Prediction(
            scores=torch.cat([p.scores for p in found], dim=1),
            spread=spread,
            features=found[0].features,
            distance=torch.stack(distance).amax(dim=0) if distance else None,
            outside=torch.stack(outside).any(dim=0) if outside else None,
            truncated=max(p.truncated for p in found),
            unscored=max(p.unscored for p in found),
        )


def _key(model: RewardModel) -> tuple[tuple[str, str], ...]:
    return tuple((head.name, head.kind) for head in model.heads)


def _agreed(members: list[Prediction]) -> Prediction:
    """The mean of an ensemble of checkpoints; its spread is theirs and their own, by the law of total variance."""
    if len(members) == 1:
        return members[0]
    scores = torch.stack([member.scores for member in members])
    variance = scores.var(dim=0)
    own = [member.spread.square() for member in members if member.spread is not None]
    outside: list[Tensor] = [member.outside for member in members if member.outside is not None]
    distance: list[Tensor] = [member.distance for member in members if member.distance is not None]
    return Prediction(
        scores=scores.mean(dim=0),
        spread=(variance + torch.stack(own).mean(dim=0) if own else variance).sqrt(),
        features=members[0].features,
        distance=torch.stack(distance).mean(dim=0) if distance else None,
        outside=torch.stack(outside).float().mean(dim=0) > 0.5 if outside else None,
        truncated=max(member.truncated for member in members),
        unscored=max(member.unscored for member in members),
    )


def read_saved(specs: Sequence[str]) -> list[SavedRewardModel]:
    """Saved reward models from their specifications, `folder-or-id` or `name=folder-or-id`, before weights are read.

    The name is the objective of a one-output classifier. UserError for a model that cannot be read, and where two
    models share a head but cannot be an ensemble: plain classifiers, other heads beside it, or another unit.
    """
    saved = []
    for spec in specs:
        name, path = split_name(spec)
        saved.append(SavedRewardModel.read(path, name=name))
    owner: dict[str, tuple[SavedRewardModel, list[str]]] = {}
    for model in saved:
        names = [head.name for head in model.layout.heads]
        for head in names:
            other, theirs = owner.setdefault(head, (model, names))
            if other is not model and not (other.describes_itself and model.describes_itself):
                raise UserError(
                    f"reward.model: {other.path} and {model.path} are both called {head}; name one: NAME={model.path}"
                )
            if theirs != names:
                raise UserError(
                    f"reward.model: {other.path} and {model.path} both have a head {head}, but are no ensemble, for "
                    f"their other heads differ ({', '.join(theirs)}; {', '.join(names)}): rename one in its "
                    "config.json and reward_heads.json"
                )
        _check_units(owner[names[0]][0], model)
    return saved


def _check_units(one: SavedRewardModel, two: SavedRewardModel) -> None:
    """Members of an ensemble must rate on one scale, or their mean means nothing."""
    for a, b in zip(one.layout.heads, two.layout.heads, strict=True):
        rated = a.kind == b.kind != "pairwise" and one.describes_itself and two.describes_itself
        if rated and (
            max(a.std, b.std) > 1.5 * min(a.std, b.std) or abs(a.mean - b.mean) > max(a.std, b.std)
        ):
            raise UserError(
                f"reward.model: {one.path} and {two.path} cannot be an ensemble: labels of {a.name} are {a.mean:.3g} ± "
                f"{a.std:.3g} in the first and {b.mean:.3g} ± {b.std:.3g} in the second: train them on one scale"
            )


def names_with_spread(saved: Sequence[SavedRewardModel]) -> list[str]:
    """Heads whose scores will come with a spread, before weights are read (`RewardSet.with_spread`)."""
    found: list[str] = []
    for model in saved:
        layout = model.layout
        several = (
            sum(other.layout.heads == layout.heads or other.layout.names == layout.names for other in saved)
            > 1
        )
        for r, head in enumerate(layout.heads):
            if several or layout.members > 1 or r in layout.noisy:
                found.append(head.name)
    return list(dict.fromkeys(found))
