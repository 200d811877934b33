"""Which engine a run has."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.resolve import resolve_device
from grpo_fast.config.settings import TrainConfig
from grpo_fast.engines.base import RolloutEngine
from grpo_fast.engines.faults import EngineError
from grpo_fast.engines.guard import Guard
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.plain import PlainEngine
from grpo_fast.engines.relay import Relay
from grpo_fast.engines.rows import FewerRows
from grpo_fast.engines.separate import SeparateEngine
from grpo_fast.engines.stops import Decode
from grpo_fast.errors import UserError
from grpo_fast.models.head import head_of
from grpo_fast.models.policy import Policy
from grpo_fast.parallel.world import ALONE, World, world_size

if TYPE_CHECKING:
    from grpo_fast.engines.vllm import VllmEngine


def engine_of(
    config: TrainConfig,
    policy: Policy,
    folder: Path,
    *,
    decode: Decode,
    tell: Callable[[str], None],
    world: World = ALONE,
) -> Guard | Relay:
    """The engine the settings ask for, guarded. The log of a server that is started goes into `folder`.

    `decode` turns token ids into text, for stop strings; `tell` is given what the user should know, a line at a time.

    With `rollout.ahead` nothing is tried again: the weights of the last push have gone on by then.
    """
    engine: RolloutEngine
    if config.engine.kind == "vllm":
        if world.size > 1:
            return _relay(config, policy, folder, world)
        engine = _vllm(config, policy, folder, config.engine.url)
    else:
        engine = FewerRows(
            builtin_engine(
                policy,
                max_rows=config.rollout.max_rows,
                settings=config.engine,
                decode=decode,
                separate=config.rollout.ahead or world.size > 1,
            ),
            tell=tell,
        )
    return Guard(
        engine,
        vocabulary=head_of(policy.model).weight.shape[0],
        retries=0 if config.rollout.ahead else config.engine.retries,
        weights=policy.named_weights,
    )


def _relay(config: TrainConfig, policy: Policy, folder: Path, world: World) -> Relay:
    """The engine of one of several processes, of which the first ones have a server each."""
    urls = servers(config)
    relay = Relay(world, policy.device)
    vocabulary = head_of(policy.model).weight.shape[0]

    def serve() -> None:
        if world.rank < len(urls):
            engine = _vllm(config, policy, folder, urls[world.rank])
            retries = 0 if config.rollout.ahead else config.engine.retries
            relay.serve(Guard(engine, vocabulary=vocabulary, retries=retries, weights=relay.held))

    world.agreed(serve)
    return relay


def servers(config: TrainConfig) -> list[str]:
    """The addresses of the servers there are; one empty one stands for a server that is started."""
    return [url.strip() for url in config.engine.url.split(",")]


def generating(config: TrainConfig) -> int:
    """How many processes generate: all, or those with a vLLM server."""
    return world_size() if config.engine.kind == "local" else min(world_size(), len(servers(config)))


def builtin_engine(
    policy: Policy,
    *,
    max_rows: int,
    settings: EngineSettings | None = None,
    decode: Decode | None = None,
    separate: bool = False,
) -> LocalEngine | PlainEngine:
    """The engine of this process that can serve the policy: on the weights that are trained, or on `separate` ones."""
    if _needs_generate(policy):
        return PlainEngine(policy.model, max_rows=max_rows)
    kind = SeparateEngine if separate else LocalEngine
    return kind(policy.model, max_rows=max_rows, settings=settings, decode=decode)


def _needs_generate(policy: Policy) -> bool:
    """Whether the built-in engine cannot decode it: it cannot be packed, or has attention sinks."""
    return not policy.packed or any(name.endswith(".sinks") for name, _ in policy.model.named_parameters())


def check_policy(config: TrainConfig, policy: Policy) -> None:
    """UserError for settings of the built-in engine that a policy which only `generate` can decode cannot have."""
    if config.engine.kind != "local" or not _needs_generate(policy):
        return
    asked = {
        "torchrun": world_size() > 1,
        "rollout.ahead": config.rollout.ahead,
        "rollout.stop_strings": bool(config.rollout.stop_strings),
        "engine.kv_dtype": config.engine.kv_dtype != "auto",
        "engine.merge_lora": config.engine.merge_lora,
    }
    for name, given in asked.items():
        if given:
            kind = type(policy.model).__name__
            raise UserError(
                f"{name}: {kind} can only be decoded by its own generate, which has no such thing"
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
    urls = servers(config)
    if len(urls) > world_size():
        raise UserError(
            f"engine.url names {len(urls)} servers, but there {'are' if world_size() > 1 else 'is'} {world_size()} "
            f"process{'es' * (world_size() > 1)}: each uses one at the most"
        )
    for url in urls:
        client = vllm_client.VllmClient(url, key=_key(config), timeout_s=min(settings.timeout_s, 30.0))
        try:
            vllm.check_version(client)
        except EngineError as error:
            raise UserError(f"engine {client.url}{error}; is it up?") from None
        finally:
            client.close()


def _vllm(config: TrainConfig, policy: Policy, folder: Path, url: str) -> VllmEngine:
    from grpo_fast.engines import vllm, vllm_server, vllm_weights  # an HTTP client is needed here alone

    settings, rollout = replace(config.engine, url=url), config.rollout
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
    try:
        return vllm.VllmEngine(settings, transfer, server=server, key=_key(config), max_rows=rollout.max_rows)
    except EngineError as error:
        raise UserError(f"engine: {error}") from None


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
