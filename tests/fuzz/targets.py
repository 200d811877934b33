"""Every parser and loader of input that is not ours, by name."""

from __future__ import annotations

from tests.fuzz import answer_targets, data_targets, model_targets, run_targets, settings_targets
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {
    **settings_targets.TARGETS,
    **data_targets.TARGETS,
    **run_targets.TARGETS,
    **answer_targets.TARGETS,
    **model_targets.TARGETS,
}


def inputs_of(total: int) -> dict[str, int]:
    """How many of `total` inputs each target gets, at least one."""
    shares = sum(target.share for target in TARGETS.values())
    return {name: max(1, round(total * target.share / shares)) for name, target in TARGETS.items()}
