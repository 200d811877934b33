"""A strict OpenAI-compatible server for tests: it refuses what the protocol does not have, and fails on demand."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny-judge"
FIELDS = {"model": str, "messages": list, "temperature": int | float, "max_tokens": int, "seed": int}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server does with one request instead of rating; `drip_s` is the pause after each byte."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0
    hang_up: bool = False


def chat_reply(content: str | None, finish_reason: str = "stop") -> bytes:
    """A chat completion with this content."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


def data_fields(payload: dict[str, Any]) -> tuple[Any, str]:
    """Prompt and completion of a rating request, decoded; asserts that each stands in one field."""
    user = payload["messages"][1]["content"]
    found = []
    for name in ("prompt", "completion"):
        assert user.count(f"<{name}>") == user.count(f"</{name}>") == 1
        found.append(json.loads(user.partition(f"<{name}>\n")[2].partition(f"\n</{name}>")[0]))
    return found[0], found[1]


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that hang up are part of the tests
            super().handle_error(request, client_address)


class JudgeServer:
    """On a free port of this machine, from `with` on. `script` is used up first, then `rate` answers.

    `payloads` are the bodies of all accepted rating requests, `times` when they came (seconds), `peak` the
    most at the same time, `connections` how many were opened, `paths` everything that was asked for.
    """

    def __init__(self, *, key: str = "", models: tuple[str, ...] = (MODEL,)) -> None:
        self.key, self.models = key, models
        self.script: list[Reply] = []
        self.models_reply: Reply | None = None
        self.rate: Callable[[dict[str, Any]], str | None] = lambda payload: "5"
        self.delay_s = 0.0
        self.payloads: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.peak = self.connections = self._active = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _refusal(self, payload: Any) -> tuple[int, str] | None:
        """Status and message for a body that is no rating request."""
        if not isinstance(payload, dict) or payload.keys() != FIELDS.keys():
            return 400, f"fields must be exactly {', '.join(FIELDS)}"
        for name, kind in FIELDS.items():
            if not isinstance(payload[name], kind) or isinstance(payload[name], bool):
                return 400, f"{name} is of the wrong type"
        roles = [message.get("role") for message in payload["messages"]]
        if roles != ["system", "user"] or any(
            message.keys() != {"role", "content"} or not isinstance(message["content"], str)
            for message in payload["messages"]
        ):
            return 400, "messages must be a system's and a user's, with texts"
        if payload["model"] not in self.models:
            return 404, f"no model {payload['model']}"
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                with server._lock:
                    server.connections += 1

            def do_GET(self) -> None:
                if self._admit("/v1/models"):
                    listed = {"object": "list", "data": [{"id": name} for name in server.models]}
                    self._send(server.models_reply or Reply(body=json.dumps(listed).encode()))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not self._admit("/v1/chat/completions"):
                    return
                if self.headers["Content-Type"] != "application/json":
                    return self._fail(415, "must be JSON")
                payload = json.loads(body)
                if refusal := server._refusal(payload):
                    return self._fail(*refusal)
                with server._lock:
                    server.payloads.append(payload)
                    server.times.append(time.monotonic())
                    server._active += 1
                    server.peak = max(server.peak, server._active)
                    reply = server.script.pop(0) if server.script else None
                try:
                    time.sleep(server.delay_s)
                    self._send(reply or Reply(body=chat_reply(server.rate(payload))))
                finally:
                    with server._lock:
                        server._active -= 1

            def _admit(self, path: str) -> bool:
                with server._lock:
                    server.paths.append(self.path)
                    server.headers.append(dict(self.headers))
                if self.path != path:
                    self._fail(404, f"no path {self.path}")
                    return False
                if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                    self._fail(401, "wrong key")
                    return False
                return True

            def _fail(self, status: int, message: str) -> None:
                self._send(Reply(status=status, body=json.dumps({"error": {"message": message}}).encode()))

            def _send(self, reply: Reply) -> None:
                time.sleep(reply.delay_s)
                if reply.hang_up:
                    self.close_connection = True
                    return
                try:
                    self.send_response(reply.status)
                    headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body))}
                    for name, value in (headers | reply.headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    if not reply.drip_s:
                        self.wfile.write(reply.body)
                        return
                    for byte in reply.body:
                        self.wfile.write(bytes([byte]))
                        time.sleep(reply.drip_s)
                except OSError:  # the client had enough
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
