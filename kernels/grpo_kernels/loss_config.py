"""The GRPO family of losses as one configuration: a choice in each row of a table, and names for rows."""

import functools
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from ._arguments import check_name, did_you_mean

RatioLevel = Literal["token", "sequence"]
Surrogate = Literal["clip", "cispo", "sapo", "gamma", "reinforce"]
KlEstimator = Literal["k1", "k2", "k3", "k3_corrected"]
Mismatch = Literal["none", "truncate", "mask", "sequence_mask"]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]

_PAIRS = ("gamma_pos", "gamma_neg")
_CHOICES = {
    "ratio_level": RatioLevel,
    "surrogate": Surrogate,
    "kl": KlEstimator,
    "mismatch": Mismatch,
    "aggregation": Aggregation,
}


# Numbers that only some choices read: with the others they must stay at their defaults.
_READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "clip_low": ("surrogate", ("clip",)),
    "clip_high": ("surrogate", ("clip", "cispo")),
    "sapo_tau_pos": ("surrogate", ("sapo",)),
    "sapo_tau_neg": ("surrogate", ("sapo",)),
    "gamma_pos": ("surrogate", ("gamma",)),
    "gamma_neg": ("surrogate", ("gamma",)),
    "mismatch_low": ("mismatch", ("mask", "sequence_mask")),
    "mismatch_high": ("mismatch", ("truncate", "mask", "sequence_mask")),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What a policy loss is made of. The defaults are GRPO (DeepSeekMath, arXiv 2402.03300).

    A number that the chosen surrogate or mismatch correction does not read must be left at its default.
    """

    ratio_level: RatioLevel = "token"
    """Importance ratio of each token, or the geometric mean over its sequence (GSPO, arXiv 2507.18071)."""
    surrogate: Surrogate = "clip"
    """Policy-gradient term: clip (PPO), cispo, sapo, gamma (VESPO) or reinforce (no ratio at all)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low (surrogate clip). The metrics count by the default with others."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high (surrogates clip and cispo); metrics as above."""
    ratio_cap: float | None = None
    """Upper bound of the ratio in the unclipped branch too (surrogate clip)."""
    dual_clip: float | None = None
    """For negative advantages the surrogate is never below dual_clip times the advantage (surrogate clip)."""
    sapo_tau_pos: float = 1.0
    """Temperature of the soft gate where the advantage is not negative (surrogate sapo)."""
    sapo_tau_neg: float = 1.05
    """Temperature of the soft gate where the advantage is negative (surrogate sapo)."""
    gamma_pos: tuple[float, float] = (2.0, 3.0)
    """(k, lambda) of the gamma weight where the advantage is not negative (surrogate gamma)."""
    gamma_neg: tuple[float, float] = (3.0, 2.0)
    """(k, lambda) of the gamma weight where the advantage is negative (surrogate gamma)."""
    kl: KlEstimator = "k3"
    """Estimator of the divergence from the reference policy."""
    kl_coef: float = 0.04
    """Weight of the divergence; 0 needs no reference log-probs."""
    mismatch: Mismatch = "none"
    """Correction for rollout log-probs that differ from the trainer's: detached exp(old - rollout), truncated
    at mismatch_high, zeroed outside [mismatch_low, mismatch_high], or the same by its geometric mean over the
    sequence. It weights the surrogate, not the KL term."""
    mismatch_low: float = 0.5
    """Lower bound of the mask modes."""
    mismatch_high: float = 2.0
    """Cap of truncate, upper bound of the mask modes."""
    entropy_quantile: float | None = None
    """Only this share of the call's loss tokens, the ones of highest entropy, carries the surrogate."""
    off_policy_threshold: float | None = None
    """Negative-advantage tokens of sequences whose mean(old - logprob) exceeds this lose the surrogate."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: the loss falls by entropy_coef times the aggregated entropy."""
    aggregation: Aggregation = "sequence_mean"
    """sequence_mean: mean over sequences of token means; token_mean: mean over tokens; constant: sum over a
    number the caller gives."""

    def __post_init__(self) -> None:
        for field, literal in _CHOICES.items():
            check_name(field, getattr(self, field), get_args(literal))
        for field, value in vars(self).items():
            if field in _PAIRS:
                _require(_is_positive_pair(value), field, "a tuple of two positive numbers", value)
            elif field not in _CHOICES and not (value is None and _default(field) is None):
                _require(_finite(value), field, "a finite number", value)
        if self.off_policy_threshold is not None:
            _require(
                self.off_policy_threshold >= 0,
                "off_policy_threshold",
                "not negative",
                self.off_policy_threshold,
            )
        for field in ("clip_low", "clip_high", "kl_coef", "entropy_coef", "mismatch_low", "mismatch_high"):
            _require(getattr(self, field) >= 0.0, field, "not negative", getattr(self, field))
        _require(self.clip_low <= 1.0, "clip_low", "at most 1", self.clip_low)
        for field in ("sapo_tau_pos", "sapo_tau_neg"):
            _require(getattr(self, field) > 0.0, field, "positive", getattr(self, field))
        for field in ("ratio_cap", "dual_clip"):
            value = getattr(self, field)
            if value is not None:
                _require(value > 1.0, field, "greater than 1", value)
                _require(self.surrogate == "clip", field, "None unless surrogate is 'clip'", value)
        if self.mismatch in ("mask", "sequence_mask"):
            expectation = f"at most mismatch_high = {self.mismatch_high}"
            _require(self.mismatch_low <= self.mismatch_high, "mismatch_low", expectation, self.mismatch_low)
        if self.entropy_quantile is not None:
            _require(
                0.0 < self.entropy_quantile <= 1.0, "entropy_quantile", "in (0, 1]", self.entropy_quantile
            )
        if self.ratio_level == "sequence":
            allowed = self.surrogate in ("clip", "cispo", "sapo")
            _require(allowed, "ratio_level", f"'token' with surrogate {self.surrogate!r}", "sequence")
        for field, (choice, readers) in _READ_BY.items():
            if getattr(self, choice) not in readers and getattr(self, field) != _default(field):
                names = ", ".join(map(repr, readers))
                raise ValueError(
                    f"{field} is used by {choice} {names} only, got {choice} {getattr(self, choice)!r}; "
                    f"leave {field} at its default {_default(field)}"
                )
        object.__setattr__(self, "_key", json.dumps(asdict(self)))

    @property
    def key(self) -> str:
        """The whole configuration as JSON: how an operator of PyTorch's dispatcher is given it."""
        return self._key  # type: ignore[attr-defined]

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_key(key: str) -> "LossConfig":
        """The configuration whose ``key`` this is."""
        fields: dict[str, Any] = json.loads(key)
        fields |= {name: tuple(fields[name]) for name in _PAIRS}
        return LossConfig(**fields)

    @property
    def couples_sequences(self) -> bool:
        """Whether a token's gradient depends on log-probs of the other tokens of its sequence."""
        return (
            self.ratio_level == "sequence"
            or self.surrogate == "gamma"
            or self.mismatch == "sequence_mask"
            or self.off_policy_threshold is not None
        )

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's gradient depends on log-probs or entropies of other tokens."""
        return self.couples_sequences or self.entropy_quantile is not None

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss needs cu_seqlens."""
        return self.couples_sequences or self.aggregation == "sequence_mean"

    def skips_zero_advantage(self, by_sequence: bool) -> bool:
        """Whether a token of advantage 0 (given by sequence, or each its own) can change neither loss nor
        gradient.

        It can where another term acts on it, and where others average over it.
        """
        if self.kl_coef != 0.0 or self.entropy_coef != 0.0 or self.entropy_quantile is not None:
            return False
        return by_sequence or not self.couples_tokens

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LossConfig":
        """The named loss, with fields replaced.

        Where these choose another surrogate or mismatch, what the preset set for its own and the new one does
        not read goes back to the default.

        rloo goes with ``group_advantages(mode="leave_one_out")``, reinforce_pp with
        ``mode="scalarized", scale="batch"``, dr_grpo with ``scale="none"``; the presets fix the loss alone.

        Raises:
            ValueError: unknown preset or field, naming the nearest known one; a value out of its range.
        """
        if name not in _PRESET_FIELDS:
            raise ValueError(f"unknown preset {name!r}{_nearest(name, _PRESET_FIELDS)}")
        for field in overrides:
            if field not in cls.__dataclass_fields__:
                raise ValueError(f"unknown loss option {field!r}{_nearest(field, cls.__dataclass_fields__)}")
        chosen = {**_PRESET_FIELDS[name], **overrides}
        for field, (choice, readers) in _READ_BY.items():
            if field not in overrides and chosen.get(choice, _default(choice)) not in readers:
                chosen.pop(field, None)
        return cls(**chosen)


def _default(field: str) -> Any:
    return LossConfig.__dataclass_fields__[field].default


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive_pair(value: object) -> bool:
    numbers = cast(tuple[Any, ...], value) if isinstance(value, tuple) else ()
    return len(numbers) == 2 and all(_finite(number) and number > 0 for number in numbers)


def _require(fine: bool, field: str, expectation: str, value: object) -> None:
    if not fine:
        raise ValueError(f"{field} must be {expectation}; got {value!r}")


def _nearest(name: str, known: Any) -> str:
    return did_you_mean(name, known) or f"; known: {', '.join(known)}"


_PRESET_FIELDS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300
    "grpo": {},
    # arXiv 2503.14476
    "dapo": {"clip_high": 0.28, "aggregation": "token_mean", "kl_coef": 0.0},
    # arXiv 2503.20783; normalizer: token budget of a completion times number of sequences
    "dr_grpo": {"aggregation": "constant", "kl_coef": 0.0},
    # arXiv 2507.18071
    "gspo": {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    # MiniMax-M1, arXiv 2506.13585; the cap 1 + 4 as in ScaleRL, arXiv 2510.13786
    "cispo": {"surrogate": "cispo", "clip_high": 4.0, "aggregation": "token_mean", "kl_coef": 0.0},
    # arXiv 2511.20347
    "sapo": {"surrogate": "sapo", "kl_coef": 0.0},
    # variational sequence-level soft policy optimization
    "vespo": {"surrogate": "gamma", "aggregation": "token_mean", "kl_coef": 0.0},
    # length-unbiased GSPO; normalizer: number of sequences
    "luspo": {
        "ratio_level": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "constant",
        "kl_coef": 0.0,
    },
    # arXiv 2402.14740; normalizer: number of sequences
    "rloo": {"surrogate": "reinforce", "aggregation": "constant", "kl_coef": 0.0},
    # arXiv 2501.03262
    "reinforce_pp": {"aggregation": "token_mean", "kl": "k2", "kl_coef": 0.0},
}

PRESETS: dict[str, LossConfig] = {name: LossConfig.preset(name) for name in _PRESET_FIELDS}
