"""Settings of what generates the completions, and of what fits into memory; sections of `settings.TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What generates the completions."""

    kind: Literal["local", "vllm"] = "local"
    """local: in this process, on the very weights that are trained; vllm: a vLLM server."""
    retries: int = 2
    """Times a rollout that fails (engine gone, completions missing, stale weights, NaN) is tried again."""
    max_mismatch: float = 0.1
    """KL divergence (k3 estimate) between the engine's and the trainer's log-probs that stops the run; 0: none does."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What may be used, and what is moved aside to fit."""

    limit_gib: float = 0.0
    """Memory the run may take on its device, in GiB: budget, checkpointing and rows are chosen to fit; 0: as given."""
