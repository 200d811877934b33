"""Settings of when a run is warned of and stopped; a section of `settings.TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """Numbers of a step over which a run warns, and stops after `patience` such steps in a row; 0: no limit."""

    kl: float = 10.0
    """KL divergence from the reference, a token; a pretrained model is lost long before: 2 suits it."""
    ratio: float = 100.0
    """Largest probability ratio of a token, new to old policy."""
    grad_norm: float = 1000.0
    """Norm of the gradient before clipping."""
    mismatch: float | None = None
    """KL (k3) of engine and trainer; unset: half of engine.max_mismatch, which stops a run at once."""
    patience: int = 10
    """Steps in a row over one of these limits after which the run stops; everything is saved."""
    skipped: int = 5
    """Steps in a row with a non-finite loss or gradient after which the run stops; 0: it never does."""
