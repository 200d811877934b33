"""Which engine a run has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grpo_fast.config.resolve import resolve_device
from grpo_fast.config.settings import TrainConfig
from grpo_fast.engines.base import RolloutEngine
from grpo_fast.engines.faults import EngineError
from grpo_fast.engines.guard import Guard
from grpo_fast.engines.local import LocalEngine
from grpo_fast.errors import UserError
from grpo_fast.models.head import head_of
from grpo_fast.models.policy import Policy

if TYPE_CHECKING:
    from grpo_fast.engines.vllm import VllmEngine


def engine_of(config: TrainConfig, policy: Policy, folder: Path) -> Guard:
    """The engine the settings ask for, guarded. The log of a server that is started goes into `folder`."""
    engine: RolloutEngine
    if config.engine.kind == "vllm":
        try:
            engine = _vllm(config, policy, folder)
        except EngineError as error:
            raise UserError(f"engine: {error}") from None
    else:
        engine = LocalEngine(policy.model, max_rows=config.rollout.max_rows)
    return Guard(
        engine,
        vocabulary=head_of(policy.model).weight.shape[0],
        retries=config.engine.retries,
        weights=policy.named_weights,
    )


def check_engine(config: TrainConfig) -> None:
    """What can be known of the engine before a model is loaded: device, program, key, a running server's version."""
    settings = config.engine
    if settings.kind != "vllm":
        return
    from grpo_fast.engines import vllm, vllm_client, vllm_server, vllm_weights

    vllm_weights.transfer_of(settings, resolve_device(config))
    if settings.executable:
        vllm_server.find_program(settings.executable)
        return
    client = vllm_client.VllmClient(settings.url, key=_key(config), timeout_s=min(settings.timeout_s, 30.0))
    try:
        vllm.check_version(client)
    except EngineError as error:
        raise UserError(f"engine {client.url}{error}; is it up?") from None
    finally:
        client.close()


def _vllm(config: TrainConfig, policy: Policy, folder: Path) -> VllmEngine:
    from grpo_fast.engines import vllm, vllm_server, vllm_weights  # an HTTP client is needed here alone

    settings, rollout = config.engine, config.rollout
    transfer = vllm_weights.transfer_of(settings, policy.device)
    server = None
    if settings.executable:
        serving = vllm_server.Serving(
            model=str(policy.model.config.name_or_path),
            dtype=str(policy.model.dtype).removeprefix("torch."),
            max_model_len=_longest(config, policy),
            max_num_seqs=rollout.max_rows,
            seed=config.seed,
            transfer=transfer.name,
            devices=settings.devices or _visible(policy.device),
        )
        server = vllm_server.VllmServer(settings, serving, folder / "vllm.log")
    return vllm.VllmEngine(settings, transfer, server=server, key=_key(config), max_rows=rollout.max_rows)


def _longest(config: TrainConfig, policy: Policy) -> int:
    asked = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    return min(asked, limit or asked)


def _visible(device: torch.device) -> str:
    """The policy's GPU as CUDA_VISIBLE_DEVICES of another process."""
    index = device.index or 0
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return seen[index] if index < len(seen) else str(index)


def _key(config: TrainConfig) -> str:
    from grpo_fast.rewards.judge_client import read_key

    return read_key(config.engine.api_key_env, "engine.api_key_env")
