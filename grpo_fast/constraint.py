"""Rewards with a floor: maximise the other objectives subject to the mean of these, by Lagrange multipliers.

The Lagrangian of max E[Σ w_k r_k] subject to E[r_c] >= floor_c has the reward Σ w_k r_k + Σ λ_c (r_c − floor_c): an
objective with a floor is one whose weight is λ_c, which rises while the policy is below the floor and falls to zero
while it is above (dual ascent, as in Tessler et al., arXiv 1805.11074). All weights are divided by their sum's growth,
1 + Σ λ_c, so that a large multiplier turns the policy and does not speed it up (Stooke et al., arXiv 2007.03964).
Letters: S sequences, R objectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor


class Multipliers:
    """One multiplier for each objective with a floor, updated once a step; nothing happens where there is none.

    `state` is what a checkpoint carries: name -> multiplier.
    """

    def __init__(
        self, names: Sequence[str], weights: Tensor, floors: Mapping[str, float], *, lr: float
    ) -> None:
        """`weights` (R,) are signed: negative where lower is better, and the floor is a ceiling then."""
        self._names, self._weights, self._floors, self._lr = list(names), weights, dict(floors), lr
        self.state = {name: abs(weights[self._names.index(name)].item()) for name in floors}

    def weights(self) -> Tensor:
        """(R,) float32: the weights of this step."""
        if not self.state:
            return self._weights
        weights = self._weights.clone()
        for name, multiplier in self.state.items():
            weights[self._names.index(name)] = multiplier * self._sign(name)
        return weights / (1 + sum(self.state.values()))

    def update(self, rewards: Tensor) -> dict[str, float]:
        """Move the multipliers by the gap between `rewards` (S, R) and the floors; returns them as metrics.

        The gap is counted in standard deviations of the batch's rewards, so that `lr` means the same in any unit.
        """
        metrics: dict[str, float] = {}
        for name, floor in self._floors.items():
            values = rewards[:, self._names.index(name)]
            values = values[~values.isnan()].double()
            if not len(values):
                continue
            gap = self._sign(name) * (floor - values.mean().item())
            scale = max(values.std(correction=0).item(), 1e-6)
            step = self._lr * max(-1.0, min(1.0, gap / scale))
            self.state[name] = max(0.0, self.state[name] + step)
            metrics |= {f"multiplier/{name}": self.state[name], f"floor_gap/{name}": max(0.0, gap)}
        return metrics

    def _sign(self, name: str) -> float:
        # A weight of 0 has a sign too: -0.0 where lower is better.
        return math.copysign(1.0, self._weights[self._names.index(name)].item())
