"""A strict vLLM server for tests: the HTTP contract of vLLM 0.33, a real model behind it, and faults on demand.

Unknown and missing fields are refused, so is an update of weights out of order. It generates with its own weights,
keeps a prefix cache that goes stale unless it is reset, and knows one transfer backend that vLLM does not have:
`bytes`, which carries the tensors inside the request (`BytesTransfer` is the sender).

`python -m tests.vllm_server serve MODEL --flags` stands in for the vllm program, with the flags grpo_fast gives it.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from torch import Tensor

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.vllm import VllmEngine
from grpo_fast.engines.vllm_weights import Parcel, description, pack_into

NUMBER = int | float
COMPLETION_FIELDS: dict[str, Any] = {
    "model": str,
    "prompt": list,
    "n": int,
    "max_tokens": int,
    "temperature": NUMBER,
    "top_k": int,
    "top_p": NUMBER,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "seed": int,
    "stop_token_ids": list,
    "ignore_eos": bool,
    "logprobs": int,
    "return_token_ids": bool,
    "return_weight_versions": bool,
}
UPDATE_FIELDS = {"names", "dtype_names", "shapes", "tensor_sizes", "data"}
QUERIES = {"/pause": {"mode", "clear_cache"}, "/sleep": {"level", "mode"}, "/wake_up": {"tags"}}


class BytesTransfer:
    """Sends the tensors themselves: what CPU tests hand weights over with."""

    name = "bytes"

    def __init__(self) -> None:
        self.chunks: list[int] = []  # bytes of each one
        self.finished = 0

    def greeting(self, world_size: int) -> Parcel:
        return Parcel({"packed": True})

    def parcel(self, chunk: list[tuple[str, Tensor]]) -> Parcel:
        buffer = torch.empty(sum(tensor.nbytes for _, tensor in chunk), dtype=torch.uint8)
        sizes = pack_into(buffer, chunk)
        self.chunks.append(buffer.numel())
        data = base64.b64encode(buffer.numpy().tobytes()).decode()
        return Parcel(description(chunk) | {"tensor_sizes": sizes, "data": data})

    def finish(self) -> None:
        self.finished += 1

    def close(self) -> None:
        pass


def engine_for(
    server: VllmTestServer,
    *,
    transfer: BytesTransfer | None = None,
    key: str = "",
    max_rows: int = 256,
    chunk_bytes: int = 4096,
    **settings: Any,
) -> VllmEngine:
    """An engine on `server`, with weights that travel as bytes."""
    given: dict[str, Any] = {"timeout_s": 20.0} | settings
    return VllmEngine(
        EngineSettings(kind="vllm", url=server.url, **given),
        transfer or BytesTransfer(),
        key=key,
        max_rows=max_rows,
        chunk_bytes=chunk_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one request instead of, or around, its right answer."""

    status: int = 200
    body: bytes | None = None
    change: Callable[[dict[str, Any]], object] | None = None
    """Spoils the right answer in place."""
    delay_s: float = 0.0
    hang_up: bool = False
    cut: bool = False
    """Half the body, then the end of the connection."""


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _need(holds: bool, message: str, status: int = 500) -> None:
    if not holds:
        raise _Refused(status, message)


class _Http(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that hang up are part of the tests
            super().handle_error(request, client_address)


@dataclass
class VllmTestServer:
    """On a free port of this machine, from `with` on. `faults[path]` are used up first, one a request."""

    model: Any
    version: str = "0.33.0"
    key: str = ""
    processed: bool = True
    """--logprobs-mode processed_logprobs, else raw_logprobs."""
    max_model_len: int = 128
    port: int = 0
    world_size: int = 1
    sleep_mode: bool = True
    dev_mode: bool = True
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    payloads: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.eval()
        self.weight_version = "default"
        self.paused = self.asleep = self.updating = self.greeted = False
        self.prefixes: dict[tuple[int, ...], Tensor] = {}
        self.pending: list[tuple[str, Tensor]] = []
        self.lock = threading.RLock()
        self.http = _Http(("127.0.0.1", self.port), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> VllmTestServer:
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    # ---- routes ----

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> dict[str, Any] | None:
        """The answer to a request, None for an empty one."""
        routes = {
            ("GET", "/health"): lambda: None,
            ("GET", "/version"): lambda: {"version": self.version},
            ("GET", "/v1/models"): lambda: {
                "object": "list",
                "data": [{"id": "policy", "max_model_len": self.max_model_len}],
            },
            ("POST", "/v1/completions"): lambda: self.completions(body),
        }
        dev = {
            ("GET", "/is_paused"): lambda: {"is_paused": self.paused},
            ("GET", "/weight_info"): lambda: {"weight_version": self.weight_version},
            ("GET", "/get_world_size"): lambda: {"world_size": self.world_size},
            ("POST", "/pause"): lambda: self.pause(query),
            ("POST", "/resume"): self.resume,
            ("POST", "/init_weight_transfer_engine"): lambda: self.init(body),
            ("POST", "/start_weight_update"): self.start,
            ("POST", "/update_weights"): lambda: self.update(body),
            ("POST", "/finish_weight_update"): lambda: self.finish(body),
            ("POST", "/reset_prefix_cache"): self.reset,
            ("POST", "/sleep"): self.sleep,
            ("POST", "/wake_up"): self.wake,
        }
        route = (routes | (dev if self.dev_mode else {})).get((method, path))
        _need(route is not None, f"no route {method} {path}", 404)
        _need(query.keys() <= QUERIES.get(path, set()), f"unknown query {sorted(query)}", 400)
        assert route is not None
        return route()

    def pause(self, query: dict[str, str]) -> dict[str, Any]:
        _need(query.get("mode") in ("abort", "wait"), "mode", 400)
        self.paused = True
        return {"status": "paused"}

    def resume(self) -> dict[str, Any]:
        self.paused = False
        return {"status": "resumed"}

    def init(self, body: Any) -> dict[str, Any]:
        _need(isinstance(body, dict) and body == {"init_info": {"packed": True}}, f"init_info {body}", 400)
        self.greeted = True
        return {"message": "Weight transfer initialized"}

    def start(self) -> dict[str, Any]:
        _need(self.greeted, "Weight transfer not initialized")
        _need(self.paused, "weights are updated while requests are served")
        _need(not self.updating, "start_weight_update called while a weight update is already active")
        _need(not self.asleep, "asleep")
        self.updating, self.pending = True, []
        return {"message": "Weight update started"}

    def update(self, body: Any) -> dict[str, Any]:
        _need(isinstance(body, dict) and body.keys() == {"update_info"}, "update_info", 400)
        _need(self.updating, "start_weight_update must be called before update_weights.")
        info = body["update_info"]
        _need(info.keys() == UPDATE_FIELDS, f"fields {sorted(info)}")
        data = torch.frombuffer(bytearray(base64.b64decode(info["data"], validate=True)), dtype=torch.uint8)
        known = dict(self.model.named_parameters())
        parts = data.split(info["tensor_sizes"])
        for name, dtype, shape, part in zip(
            info["names"], info["dtype_names"], info["shapes"], parts, strict=True
        ):
            _need(name in known, f"KeyError: {name}")
            _need(list(known[name].shape) == shape, f"shape of {name}")
            self.pending.append((name, part.view(getattr(torch, dtype)).view(shape)))
        return {"message": "Weights updated"}

    @torch.no_grad()
    def finish(self, body: Any) -> dict[str, Any]:
        _need(self.updating, "no weight update is active")
        _need(body is None or (body.keys() == {"weight_version"}), "weight_version", 400)
        known = dict(self.model.named_parameters())
        for name, value in self.pending:
            known[name].copy_(value)
        self.updating, self.pending = False, []
        if body:
            _need(isinstance(body["weight_version"], str), "weight_version must be a text", 400)
            self.weight_version = body["weight_version"]
        return {"message": "Weight update finished"}

    def reset(self) -> dict[str, Any]:
        self.prefixes.clear()
        return {"success": True}

    def sleep(self) -> dict[str, Any]:
        _need(self.sleep_mode, "sleep mode is not enabled")
        self.asleep = True
        self.prefixes.clear()
        return {"status": "sleeping"}

    def wake(self) -> dict[str, Any]:
        self.asleep = False
        return {"status": "awake"}

    # ---- generation ----

    def completions(self, body: Any) -> dict[str, Any]:
        _need(isinstance(body, dict), "no object", 400)
        body = dict(body)
        stop = body.pop("stop", None), body.pop("include_stop_str_in_output", None)
        _need(stop == (None, None), "this server's models have no text to stop at", 400)
        _need(body.keys() == COMPLETION_FIELDS.keys(), f"fields {sorted(body)}", 400)
        for name, kind in COMPLETION_FIELDS.items():
            right = isinstance(body[name], kind) and (kind is bool or not isinstance(body[name], bool))
            _need(right, f"{name} is of the wrong type", 400)
        _need(body["ignore_eos"], "the model's own end would take part", 400)
        neutral = (
            body["repetition_penalty"] == 1 and body["presence_penalty"] == body["frequency_penalty"] == 0
        )
        _need(neutral, "penalties are not part of the policy's distribution", 400)
        _need(body["model"] == "policy", f"no model {body['model']}", 404)
        _need(-(2**63) <= body["seed"] < 2**63, "seed", 400)
        _need(body["temperature"] > 0 or body["n"] == 1, "n must be 1 when using greedy sampling", 400)
        _need(bool(body["prompt"]), "prompt is empty", 400)
        _need(
            len(body["prompt"]) + body["max_tokens"] <= self.max_model_len, "longer than max_model_len", 400
        )
        _need(not self.paused and not self.asleep, "paused", 503)
        self.payloads.append(body)
        choices = [self._choice(body, index) for index in range(body["n"])]
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": "policy",
            "choices": choices,
            "usage": {},
        }

    @torch.no_grad()
    def _choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"] + index)
        tokens: list[int] = []
        logprobs: list[float] = []
        reason = "length"
        while len(tokens) < body["max_tokens"]:
            raw = self._logits(body["prompt"], tokens)
            drawn_from = _processed(raw, body)
            token = int(
                drawn_from.argmax()
                if body["temperature"] == 0
                else torch.multinomial(drawn_from.exp(), 1, generator=generator)
            )
            tokens.append(token)
            logprobs.append((drawn_from if self.processed else raw.log_softmax(-1))[token].item())
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        return {
            "index": index,
            "text": "",
            "logprobs": {
                "token_logprobs": logprobs,
                "tokens": ["?"] * len(tokens),
                "text_offset": [0] * len(tokens),
                "top_logprobs": [None] * len(tokens),
            },
            "finish_reason": reason,
            "stop_reason": tokens[-1] if reason == "stop" else None,
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "weight_versions": [{"version": self.weight_version, "start": 0, "end": len(tokens)}],
        }

    def _logits(self, prompt: list[int], tokens: list[int]) -> Tensor:
        """(V,) float32; what follows on a prompt alone comes from the prefix cache, however old that is."""
        prefix = tuple(prompt)
        if not tokens and prefix in self.prefixes:
            return self.prefixes[prefix]
        ids = torch.tensor([prompt + tokens])
        logits = self.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        if not tokens:
            self.prefixes[prefix] = logits
        return logits

    # ---- HTTP ----

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._serve("GET")

            def do_POST(self) -> None:
                self._serve("POST")

            def _serve(self, method: str) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urlsplit(self.path)
                query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
                server.paths.append(f"{method} {parts.path}")
                scripted = server.faults.get(parts.path, [])
                fault = scripted.pop(0) if scripted else Fault()
                time.sleep(fault.delay_s)
                if fault.hang_up:
                    self.close_connection = True
                    return
                status, answer = fault.status, None
                if status == 200 and fault.body is None:
                    status, answer = self._answer(method, parts.path, query, raw)
                if fault.change and isinstance(answer, dict):
                    fault.change(answer)
                body = fault.body
                if body is None:
                    body = b"" if answer is None else json.dumps(answer).encode()
                self._send(status, body, cut=fault.cut)

            def _answer(self, method: str, path: str, query: dict[str, str], raw: bytes) -> tuple[int, Any]:
                wrong = server.key and self.headers["Authorization"] != f"Bearer {server.key}"
                if wrong and path.startswith("/v1"):
                    return 401, {"error": "Unauthorized"}
                try:
                    with server.lock:
                        return 200, server.answer(method, path, query, json.loads(raw) if raw else None)
                except _Refused as refused:
                    return refused.status, {"error": {"message": str(refused)}}

            def _send(self, status: int, body: bytes, *, cut: bool) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                except OSError:  # the client had enough
                    self.close_connection = True
                if cut:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def _processed(logits: Tensor, body: dict[str, Any]) -> Tensor:
    """Log-probs (V,) of the distribution tokens are drawn from."""
    if body["temperature"] == 0:
        return logits.log_softmax(-1)
    logprobs = (logits / body["temperature"]).log_softmax(-1)
    order = logprobs.argsort(descending=True)
    if body["top_k"]:
        logprobs[order[body["top_k"] :]] = float("-inf")
    if body["top_p"] < 1:
        kept = logprobs.softmax(-1)[order]
        logprobs[order[kept.cumsum(0) - kept >= body["top_p"]]] = float("-inf")
    logprobs[logprobs < logprobs.max() + torch.tensor(body["min_p"]).log()] = float("-inf")
    return logprobs.log_softmax(-1)


def main() -> None:
    """Stand in for `vllm serve`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for name in ("host", "dtype", "seed", "max-num-seqs", "gpu-memory-utilization", "served-model-name"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "max-model-len"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--logprobs-mode", choices=["raw_logprobs", "processed_logprobs"], required=True)
    parser.add_argument("--generation-config", choices=["vllm"], required=True)
    parser.add_argument("--weight-transfer-config", type=json.loads, required=True)
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--max-logprobs")  # an option a user may give
    asked = parser.parse_args()
    assert asked.host == "127.0.0.1" and asked.served_model_name == "policy"
    assert asked.weight_transfer_config == {"backend": "bytes"} and "PYTHONHOME" not in os.environ
    from transformers import AutoModelForCausalLM

    server = VllmTestServer(
        model=AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype),
        key=os.environ["VLLM_API_KEY"],
        processed=asked.logprobs_mode == "processed_logprobs",
        max_model_len=asked.max_model_len,
        port=asked.port,
        sleep_mode=asked.enable_sleep_mode,
        dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
    )
    print("serving", asked.model, flush=True)
    server.http.serve_forever(0.01)


if __name__ == "__main__":
    main()
