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
    sleep: bool = False
    """The engine gives its GPU memory (cache, graphs, a server's weights) back while the policy is trained."""
    max_mismatch: float | None = None
    """KL (k3) of engine and trainer that stops the run; unset: 0.1 (none with top_k, top_p, min_p); 0: never."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """local: decode by captured CUDA graphs, checked against the eager step; auto: on a CUDA device."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """local: keys and values as the model computes them, or in 8 bits, half the cache (needs loss.mismatch)."""
    merge_lora: bool = False
    """local, with LoRA: adapters are added to the weights while generating; kept copies restore these to the bit."""
    merge_copies: Literal["device", "host"] = "device"
    """Where those copies of the adapted layers' weights are; host: no device memory, but two transfers a rollout."""
    url: str = ""
    """vllm: a running server, http://127.0.0.1:8000, of several processes several (a,b); empty: engine.executable."""
    executable: str = ""
    """vllm: the vllm program of an environment of its own; it is started, and stopped at the end of the run."""
    options: tuple[str, ...] = ()
    """vllm: further arguments of the program that is started, each NAME=VALUE or NAME of its flags, without dashes."""
    devices: str = ""
    """vllm: GPUs of the server that is started, by number (1,2); empty: it shares the policy's."""
    transfer: Literal["auto", "ipc", "nccl"] = "auto"
    """vllm: weights are handed over inside one GPU (ipc) or between GPUs (nccl); auto: ipc where the GPU is shared."""
    timeout_s: float = 600.0
    """vllm: seconds without a finished group after which a rollout has failed, and longest time of a hand-over."""
    start_timeout_s: float = 900.0
    """vllm: seconds the server that is started may take until it answers."""
    gpu_memory_utilization: float = 0.4
    """vllm: share of its GPU the server that is started may use."""
    allow_remote: bool = False
    """vllm: let engine.url be another machine; such a server unpickles what it is sent, so its network must be safe."""
    api_key_env: str = ""
    """vllm: name of the environment variable that holds the key of engine.url; empty: none is sent."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What may be used, and what is moved aside to fit."""

    limit_gib: float = 0.0
    """Memory the run may take on its device, in GiB: budget, checkpointing and rows are chosen to fit; 0: as given."""
    optimizer: Literal["device", "while_training", "host"] = "device"
    """Masters and optimizer states: on the device, there only while it trains, or on the host, which then updates."""
    activations_on_host: bool = False
    """What the policy's body saves for its backward pass waits on the host (with checkpointing: the layers' inputs)."""


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """What several processes (torchrun) share out, and how; one process ignores it."""

    head: Literal["gathered", "vocabulary"] = "gathered"
    """The head's weight: gathered by each process for its own tokens, or its rows stay where they are, and each process
    computes its part of the vocabulary for everybody's tokens (untied heads only; less memory, more to send)."""
    reduce: Literal["step", "micro_batch"] = "step"
    """Sum the processes' gradients once a step, or after each micro-batch: more to send, and no process ever holds the
    whole gradient (4 bytes a trained parameter)."""
