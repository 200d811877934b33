"""Signs, while a policy is trained, that its rewards mean less than they did: what the reward model is asked about has
left what it was trained on, or an ensemble no longer agrees.

Over-optimised rewards rise while the truth falls (Gao et al., arXiv 2210.10760); neither sign needs the truth. Both
are compared with the best the run has been: a policy that improves moves towards the good replies of the reward
model's training first, and away from them when it begins to exploit. Windows of steps are compared, so that one odd
batch rings no bell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_fast.trust import degeneration
from grpo_fast.trust.history import WINDOW, History, Row, Series, mean

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


def signs(rows: Sequence[Row]) -> dict[str, str]:
    """What the last steps of `rows` (metrics, the first step first) warn of: name -> sentence. Empty when all is well.

    Reads `outside_frac`, `distance` and `spread/<objective>`; needs two windows of steps.
    """
    return signs_of(History(rows))


def signs_of(history: History) -> dict[str, str]:
    """`signs` of a history that grows."""
    found: dict[str, str] = {}
    if history.steps < 2 * WINDOW:
        return found
    share = _windows(history.series("outside_frac"))
    if share and share[1] > min(STRANGE, max(OUTSIDE, OUTSIDE_GROWTH * share[0])):
        found["outside"] = (
            f"{share[1]:.0%} of the completions are unlike anything the reward model was trained on "
            f"({share[0]:.0%} at best): its scores may mean nothing there"
        )
    distance = history.series("distance")
    far = _windows(distance)
    if far and far[0] > 0 and far[1] > max(DISTANCE_GROWTH * far[0], mean(distance.start)):
        found["distance"] = (
            f"completions lie {far[1] / far[0]:.2f} times as far from what the reward model was trained on as they "
            "did: its scores are worth less there"
        )
    for key in (key for key in history.last if key.startswith("spread/")):
        if (spread := _windows(history.series(key))) and spread[1] > SPREAD_GROWTH * spread[0] > 0:
            name = key.removeprefix("spread/")
            found[key] = (
                f"the reward model is {spread[1] / spread[0]:.1f} times as unsure of {name} as it was: what the policy "
                "gains there may be its errors"
            )
    return found


def _windows(series: Series) -> tuple[float, float] | None:
    """The lowest mean over WINDOW steps, of those before the last window, and the last one's."""
    return (series.lowest[-1 - WINDOW], series.means[-1]) if len(series.means) > WINDOW else None


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
        self._history = History(rows, weights=weights)
        self._said = {
            key.removeprefix("warning/") for row in rows for key in row if key.startswith("warning/")
        }

    def step(self, metrics: Row) -> dict[str, str]:
        """The signs that this step shows for the first time."""
        self._history.add(dict(metrics))
        found = signs_of(self._history)
        found |= degeneration.signs_of(self._history, said=self._said)
        new = {name: text for name, text in found.items() if name not in self._said}
        self._said |= new.keys()
        return new
