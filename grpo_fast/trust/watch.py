"""Signs, while a policy is trained, that its rewards mean less than they did: what the reward model is asked about has
left what it was trained on, or an ensemble no longer agrees.

Over-optimised rewards rise while the truth falls (Gao et al., arXiv 2210.10760); neither sign needs the truth. Both
are compared with the best the run has been: a policy that improves moves towards the good replies of the reward
model's training first, and away from them when it begins to exploit. Windows of steps are compared, so that one odd
batch rings no bell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_fast.trust import degeneration

WINDOW = 5
"""Steps that are averaged."""
OUTSIDE = 0.15
"""Share of completions outside the reward model's training distribution that is too much (5% is to be expected)."""
OUTSIDE_GROWTH = 2.0
"""... and how many times the lowest share so far it must be."""
STRANGE = 0.5
"""Share from which on nothing needs to have grown: the reward model was never meant for such completions."""
DISTANCE_GROWTH = 1.1
"""How many times as far from the training replies as at their nearest completions may lie on average, and further than
in the first steps."""
SPREAD_GROWTH = 1.5
"""How many times its lowest spread so far an ensemble may reach."""

Row = Mapping[str, Any]


def signs(rows: Sequence[Row]) -> dict[str, str]:
    """What the last steps of `rows` (metrics, the first step first) warn of: name -> sentence. Empty when all is well.

    Reads `outside_frac`, `distance` and `spread/<objective>`; needs two windows of steps.
    """
    found: dict[str, str] = {}
    if len(rows) < 2 * WINDOW:
        return found
    share = _windows(rows, "outside_frac")
    if share and share[1] > min(STRANGE, max(OUTSIDE, OUTSIDE_GROWTH * share[0])):
        found["outside"] = (
            f"{share[1]:.0%} of the completions are unlike anything the reward model was trained on "
            f"({share[0]:.0%} at best): its scores may mean nothing there"
        )
    far = _windows(rows, "distance")
    if far and far[0] > 0 and far[1] > max(DISTANCE_GROWTH * far[0], _first(rows, "distance")):
        found["distance"] = (
            f"completions lie {far[1] / far[0]:.2f} times as far from what the reward model was trained on as they "
            "did: its scores are worth less there"
        )
    for key in (key for key in rows[-1] if key.startswith("spread/")):
        if (spread := _windows(rows, key)) and spread[1] > SPREAD_GROWTH * spread[0] > 0:
            name = key.removeprefix("spread/")
            found[key] = (
                f"the reward model is {spread[1] / spread[0]:.1f} times as unsure of {name} as it was: what the policy "
                "gains there may be its errors"
            )
    return found


def _first(rows: Sequence[Row], key: str) -> float:
    """The mean over the first WINDOW steps that logged `key`."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)][:WINDOW]
    return sum(values) / len(values)


def _windows(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    """The lowest mean over WINDOW steps that logged `key`, of those before the last window, and the last one's."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    means = [sum(values[i : i + WINDOW]) / WINDOW for i in range(len(values) - WINDOW + 1)]
    return (min(means[:-WINDOW]), means[-1]) if len(means) > WINDOW else None


_METRICS = {
    "outside": ("outside_frac",),
    "distance": ("distance",),
    "reward_collapse": ("reward/",),
    "no_spread": ("group_std/",),
    "limit_kl": ("kl",),
    "limit_ratio": ("ratio_max",),
    "limit_grad_norm": ("grad_norm",),
    "limit_mismatch": ("mismatch_k3",),
    "limit_skipped": ("loss", "grad_norm"),
}


def metrics_of(name: str) -> tuple[str, ...]:
    """Which metrics a sign (or a limit, `limit_<name>`) is about; one that ends in `/` stands for all that begin so."""
    if name.startswith("spread/"):
        return ("spread/",)
    rule = degeneration.RULES.get(name)
    return (rule.metric,) if rule else _METRICS.get(name, ())


class Watch:
    """Keeps the history of a run and says each sign once: these, and those of a policy that degenerates."""

    def __init__(self, rows: Sequence[Row] = (), *, weights: Mapping[str, float] | None = None) -> None:
        """`rows`: the steps that an earlier process took; `weights`: the objectives' (see `degeneration.signs`)."""
        self._rows = [dict(row) for row in rows]
        self._weights = weights
        self._said = {
            key.removeprefix("warning/") for row in rows for key in row if key.startswith("warning/")
        }

    def step(self, metrics: Row) -> dict[str, str]:
        """The signs that this step shows for the first time."""
        self._rows.append(dict(metrics))
        found = signs(self._rows) | degeneration.signs(self._rows, self._weights)
        new = {name: text for name, text in found.items() if name not in self._said}
        self._said |= new.keys()
        return new
