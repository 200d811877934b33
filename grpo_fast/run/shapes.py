"""The shapes of a run's own files, held against what is really in them: a folder may be damaged, or a stranger's."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grpo_fast.data.rated import shown
from grpo_fast.run.progress import PHASES

LARGEST_STEP = 2**53


@dataclass(frozen=True)
class Each:
    """An object whose values, whatever they are called, have one shape."""

    shape: Any


Shape = Each | Mapping[str, Any] | Literal["number", "text", "scalar", "pair", "step", "phase"]
"""A kind of value, or an object's keys with their shapes; other keys are not looked at. null fits everywhere but in a
metrics row's place."""

_MEASURED: Shape = {"mean": "number", "ci95": "pair"}
_WHEN = ("before", "after", "change")
METRICS: Shape = {"phase": "phase", "step": "step", "time_s": "number", "*": "scalar"}
SAMPLES: Shape = {
    "when": "text",
    "step": "number",
    "prompt": "text",
    "completion": "text",
    "kind": "text",
    "finish_reason": "text",
    "scores": Each("number"),
    "judge": Each("number"),
    "labels": Each("number"),
}
SUMMARY: Shape = {
    **dict.fromkeys(("name", "status", "prompt_format"), "text"),
    **dict.fromkeys(("steps", "seed", "wall_s", "tokens_per_s", "peak_memory_gib", "prompts"), "number"),
    "phase_s": Each("number"),
    "objectives": Each(
        {
            "weight": "number",
            **{f"{source}_{when}": _MEASURED for source in ("judge", "reward") for when in _WHEN},
        }
    ),
    "mean_judge_change": _MEASURED,
    "over_refusal": {"prompts": "number", **dict.fromkeys(_WHEN, _MEASURED)},
    "reward_model": Each(dict.fromkeys(("mae", "pearson", "spearman", "n"), "number")),
    "environment": Each("scalar"),
}


def parsed(text: str | bytes, shape: Shape | None = None) -> dict[str, Any]:
    """The JSON object in `text`, of this shape; ValueError, in words, for anything else."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not an object")
    if shape is not None and (problem := misfit(found, shape)):
        raise ValueError(problem)
    return found


def misfit(value: Any, shape: Shape, name: str = "") -> str:
    """What about `value` is not of the shape, in words; empty where it fits."""
    if isinstance(shape, str):
        fits = _FITS[shape](value)
        return "" if fits else f"{_named(name)} must be {_WORDS[shape]}, got {shown(value)}"
    if value is None and name:
        return ""
    if not isinstance(value, dict):
        return f"{_named(name)} must be an object, got {shown(value)}"
    if isinstance(shape, Each):
        inner: dict[str, Any] = dict.fromkeys(value, shape.shape)
    else:
        rest = shape.get("*")
        inner = {key: shape.get(key, rest) for key in value} | {
            key: kind for key, kind in shape.items() if kind in ("step", "phase")
        }
    places = ((key, kind) for key, kind in inner.items() if kind is not None)
    problems = (misfit(value.get(key), kind, f"{name}.{key}" if name else key) for key, kind in places)
    return next((problem for problem in problems if problem), "")


def _named(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:79]}…")


def is_finite(value: Any) -> bool:
    """Whether it is a number, and neither a bool nor beyond what a float can hold."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) <= sys.float_info.max


_FITS = {
    "number": lambda v: v is None or is_finite(v),
    "text": lambda v: v is None or isinstance(v, str),
    "scalar": lambda v: v is None or isinstance(v, str | bool) or is_finite(v),
    "pair": lambda v: v is None or (isinstance(v, list) and len(v) == 2 and all(map(is_finite, v))),
    "step": lambda v: type(v) is int and 0 <= v <= LARGEST_STEP,
    "phase": lambda v: isinstance(v, str) and v in PHASES,
}
_WORDS = {
    "number": "a finite number or null",
    "text": "a text or null",
    "scalar": "a number, a text, true, false or null",
    "pair": "two finite numbers or null",
    "step": "a whole number from 0 on",
    "phase": f"one of {', '.join(PHASES)}",
}
