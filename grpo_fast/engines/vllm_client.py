"""HTTP to a vLLM server: bounded answers, time limits, and errors that say what to mend.

Requests go to one address and nowhere else: no proxy from the environment, no redirect is followed. The key stands in
the Authorization header alone and is never part of a message.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import httpx2

from grpo_fast.data.records import one_line
from grpo_fast.engines.faults import EngineError
from grpo_fast.errors import UserError

LARGEST_BODY = 1 << 20  # bytes of an answer that holds no completions
CONNECT_S = 10.0


class VllmClient:
    """Requests to one server. What may pass is an `EngineError`, what the user must mend a `UserError`."""

    def __init__(self, url: str, *, key: str = "", timeout_s: float) -> None:
        self.url, self._key, self._timeout_s = url.rstrip("/"), key, timeout_s
        # Nothing is compressed: what is read is what counts against the largest body.
        self._options: dict[str, Any] = {
            "headers": {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            "timeout": httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)),
            "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            # once, and where there is something to verify: it takes longer than many a request
            "verify": self.url.lower().startswith("https:") and httpx2.create_ssl_context(trust_env=False),
            "follow_redirects": False,
            "trust_env": False,
        }
        self._client = httpx2.Client(**self._options)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        params: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """The JSON object in the answer; {} for an empty body."""
        timeout = self._options["timeout"] if timeout_s is None else httpx2.Timeout(timeout_s)
        try:
            with self._client.stream(
                method, self.url + path, json=payload, params=params, timeout=timeout
            ) as answer:
                body = bytearray()
                for chunk in answer.iter_raw():
                    body += chunk
                    if len(body) > LARGEST_BODY:
                        raise EngineError(f"{path}: its answer is larger than {LARGEST_BODY >> 10} KiB")
        except httpx2.HTTPError as error:
            raise self._broken(path, error) from None
        return self._read(path, answer.status_code, bytes(body)) if body or answer.status_code != 200 else {}

    def session(self) -> httpx2.AsyncClient:
        """A client for `completion`, one for each event loop; how long one may take is for its caller to say."""
        patient: dict[str, Any] = {"timeout": httpx2.Timeout(None, connect=min(CONNECT_S, self._timeout_s))}
        return httpx2.AsyncClient(**(self._options | patient))

    async def completion(
        self, session: httpx2.AsyncClient, payload: dict[str, Any], *, largest: int
    ) -> dict[str, Any]:
        """The answer of `/v1/completions`, at most `largest` bytes."""
        path = "/v1/completions"
        try:
            async with session.stream("POST", self.url + path, json=payload) as answer:
                body = bytearray()
                async for chunk in answer.aiter_raw():
                    body += chunk
                    if len(body) > largest:
                        raise EngineError(f"{path}: its answer is larger than {largest >> 10} KiB")
        except httpx2.HTTPError as error:
            raise self._broken(path, error) from None
        return self._read(path, answer.status_code, bytes(body))

    def _broken(self, path: str, error: httpx2.HTTPError) -> EngineError:
        if isinstance(error, httpx2.TimeoutException):
            return EngineError(f"{path}: no answer within engine.timeout_s = {self._timeout_s:g} s")
        return EngineError(f"{path}: no connection or a broken one ({self._shown(str(error))})")

    def _read(self, path: str, status: int, body: bytes) -> dict[str, Any]:
        if status == 200:
            try:
                answer = json.loads(body)
            except (ValueError, RecursionError):
                answer = None
            if not isinstance(answer, dict):
                raise EngineError(f"{path}: its answer is no JSON object: {self._shown(body)}")
            return answer
        said = f"{path}: answered {status} {self._shown(body)}"
        if status == 429 or status >= 500:
            raise EngineError(said)
        if status in (401, 403):
            self.refuse(f"{said}: name the variable of its key in engine.api_key_env")
        if status == 404:
            self.refuse(
                f"{said}: the server must be vLLM's, started with VLLM_SERVER_DEV_MODE=1, and engine.url its root"
            )
        self.refuse(said)

    def refuse(self, problem: str) -> NoReturn:
        """Raises `UserError` of one line that begins with the address."""
        raise UserError(one_line(f"engine {self.url}: {problem}"))

    def _shown(self, said: str | bytes) -> str:
        """What a server said, short, escaped, and without the key, should it repeat that."""
        text = said[:4096].decode(errors="replace") if isinstance(said, bytes) else said
        if self._key:
            text = text.replace(self._key, "[key]")
        return repr(text if len(text) <= 120 else f"{text[:119]}…")
