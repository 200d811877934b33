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
    """The run stops when the engine's log-probs diverge this far from the trainer's (k3 estimate of the KL); 0: never."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What may be used, and what is moved aside to fit."""

    limit_gib: float = 0.0
    """Memory the run may take on its device, in GiB: budget, checkpointing and rows are chosen to fit; 0: as given."""
    optimizer: Literal["device", "while_training", "host"] = "device"
    """Masters and optimizer states: on the device, there only while it trains, or on the host, which then updates."""
    activations_on_host: bool = False
    """What the policy's body saves for its backward pass waits on the host (with checkpointing: the layers' inputs)."""
