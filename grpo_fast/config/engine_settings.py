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
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """local: decode by captured CUDA graphs, checked against the eager step; auto: on a CUDA device."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """local: keys and values as the model computes them, or in 8 bits, half the cache (needs loss.mismatch)."""
    merge_lora: bool = False
    """local, with LoRA: adapters are added to the weights while generating; kept copies restore these to the bit."""
    merge_copies: Literal["device", "host"] = "device"
    """Where those copies of the adapted layers' weights are; host: no device memory, but two transfers a rollout."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What may be used, and what is moved aside to fit."""

    limit_gib: float = 0.0
    """Memory the run may take on its device, in GiB: budget, checkpointing and rows are chosen to fit; 0: as given."""
