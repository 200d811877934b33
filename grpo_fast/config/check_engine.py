"""The checks of the engine's settings that need no file and no server."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import fields
from urllib.parse import SplitResult, urlsplit

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.rules import FieldError

_OF_EVERY_KIND = ("kind", "retries", "max_mismatch", "sleep")
_BUILT_IN = ("cuda_graphs", "kv_dtype", "merge_lora", "merge_copies")
_OF_A_STARTED_SERVER = ("options", "devices", "gpu_memory_utilization", "start_timeout_s")
_SET_HERE = (
    *("host", "port", "uds", "api-key", "served-model-name", "model", "dtype", "max-model-len", "seed"),
    *(
        "max-num-seqs",
        "logprobs-mode",
        "weight-transfer-config",
        "generation-config",
        "gpu-memory-utilization",
    ),
    "enable-sleep-mode",
)
_NOT_HERE = {
    "config": "a file of options could open the server to the network",
    "hf-token": "config.toml and the list of processes would show it; set HF_TOKEN in the environment",
}


def check_engine(engine: EngineSettings) -> None:
    """Raises `FieldError` for settings that contradict each other, and for an address that may not be used."""
    given = {item.name for item in fields(engine) if getattr(engine, item.name) != item.default}
    if engine.kind == "local":
        for item in fields(engine):
            if item.name in given and item.name not in (*_OF_EVERY_KIND, *_BUILT_IN):
                raise FieldError(f"engine.{item.name}", "needs engine.kind = vllm")
        return
    for name in _BUILT_IN:
        if name in given:
            raise FieldError(f"engine.{name}", "needs engine.kind = local")
    if engine.url and engine.executable:
        raise FieldError(
            "engine.url", "cannot be given with engine.executable: one server, running or started"
        )
    if not engine.url and not engine.executable:
        raise FieldError("engine.kind", "is vllm, which needs engine.url or engine.executable")
    if engine.executable:
        for name in ("allow_remote", "api_key_env"):
            if name in given:
                raise FieldError(
                    f"engine.{name}", "needs engine.url: a started server is local, its key made here"
                )
        _check_started(engine)
        return
    for name in _OF_A_STARTED_SERVER:
        if name in given:
            raise FieldError(
                f"engine.{name}", "needs engine.executable: the server at engine.url is as it is"
            )
    for url in engine.url.split(","):
        _check_url(url.strip(), engine)


def _check_started(engine: EngineSettings) -> None:
    if engine.devices and not re.fullmatch(r"\d+(,\d+)*", engine.devices):
        raise FieldError("engine.devices", f"must be numbers of GPUs as 1,2, got {engine.devices!r}")
    if engine.devices and engine.sleep:
        raise FieldError("engine.sleep", "shares one GPU, it cannot be given with engine.devices")
    for option in engine.options:
        name = option.partition("=")[0].lower().replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", name):
            raise FieldError("engine.options", f"must be NAME=VALUE without dashes before it, got {option!r}")
        # vLLM takes the beginning of a name for the whole of it
        if meant := next((known for known in _SET_HERE if known.startswith(name)), None):
            raise FieldError("engine.options", f"must not set {meant}: grpo_fast sets it itself")
        if forbidden := next((known for known in _NOT_HERE if known.startswith(name)), None):
            raise FieldError("engine.options", f"must not set {forbidden}: {_NOT_HERE[forbidden]}")


def check_address(section: str, url: str) -> SplitResult:
    """The parts of `section`.url; FieldError for what is none, or holds a secret that files would then show."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise FieldError(f"{section}.url", "must be as http://127.0.0.1:8000") from None
    if "@" in parts.netloc or parts.query or parts.fragment:  # not shown: it may hold a key
        raise FieldError(
            f"{section}.url",
            f"must have no user, query or fragment; name the key's variable in {section}.api_key_env",
        )
    if parts.scheme not in ("http", "https") or not host or not url.isprintable():
        raise FieldError(f"{section}.url", f"must be as http://127.0.0.1:8000, got {url!r}")
    return parts


def _check_url(url: str, engine: EngineSettings) -> None:
    parts = check_address("engine", url)
    host = parts.hostname or ""
    if parts.path not in ("", "/"):
        raise FieldError("engine.url", f"must be the server's root, without {parts.path}")
    if not is_loopback(host):
        if not engine.allow_remote:
            raise FieldError(
                "engine.url",
                f"is {host}, not this machine, and the weights' hand-over lets whoever reaches that server run code "
                "there; on a network you trust set engine.allow_remote = true",
            )
        if engine.transfer == "ipc":
            raise FieldError("engine.transfer", f"ipc needs one machine, engine.url is {host}: use nccl")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
