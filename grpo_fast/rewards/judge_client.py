"""HTTP to a judge's server: attempts, time limits, bounded bodies, and errors that name what to mend.

Requests go to one address and nowhere else: no proxy from the environment, no redirect is followed. The key is
read from an environment variable and stands in the Authorization header alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar

import httpx2

from grpo_fast.data.records import one_line
from grpo_fast.errors import UserError

BACKOFF_S = 0.5  # before the first repetition; doubles with each further one
LONGEST_BACKOFF_S = 30.0
LONGEST_RETRY_AFTER_S = 60.0  # a server may ask for a longer wait, but does not get it
LARGEST_BODY = 1 << 20  # bytes of a response; an answer has a few hundred

T = TypeVar("T")


class JudgeClient:
    """Requests to one server, from any number of threads; `requests` counts them, `retries` the repeated ones."""

    def __init__(
        self, url: str, *, model: str, api_key_env: str, timeout_s: float, retries: int, connections: int
    ) -> None:
        """Raises `UserError` for an address that cannot work and for a key that is not there."""
        _check_url(url)
        self._url, self._model, self._variable = url.rstrip("/"), model, api_key_env
        self._key = read_key(api_key_env, "judge.api_key_env")
        self._timeout_s, self._retries = timeout_s, retries
        self._client = httpx2.Client(
            # Nothing is compressed: what is read is what counts against LARGEST_BODY.
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            timeout=timeout_s,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            verify=self._url.lower().startswith("https:"),  # else there are no certificates to read
            follow_redirects=False,
            trust_env=False,
        )
        self._jitter = random.Random()  # its own: the run's generators stay as they are
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self.requests = self.retries = 0

    def close(self) -> None:
        """Ends the waits between attempts and closes the connections."""
        self._closed.set()
        self._client.close()

    def request(
        self, method: str, path: str, payload: dict[str, Any] | None, read: Callable[[dict[str, Any]], T]
    ) -> T:
        """What `read` makes of the response; repeats what may go better another time."""
        problem = _AgainError("was never asked")
        for attempt in range(self._retries + 1):
            if attempt:
                longest = min(BACKOFF_S * 2 ** (attempt - 1), LONGEST_BACKOFF_S)
                self._closed.wait(max(longest * self._jitter.uniform(0.5, 1), problem.wait_s))
            if self._closed.is_set():
                raise UserError(f"judge {self._url}: closed while requests were under way")
            if payload is not None:
                with self._lock:
                    self.requests += 1
                    self.retries += attempt > 0
            try:
                body = self._send(method, path, payload)
                try:
                    response = json.loads(body)
                    if not isinstance(response, dict):
                        raise TypeError
                    return read(response)
                except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                    raise _AgainError(
                        f"its answer is not of the OpenAI protocol: {self.shown(body)}"
                    ) from None
            except _AgainError as error:
                problem = error
        attempts = self._retries + 1
        self.refuse(f"failed {attempts} time{'s' * (attempts > 1)}, the last time: {problem}", path)

    def _send(self, method: str, path: str, payload: dict[str, Any] | None) -> bytes:
        """The body of a response with status 200; `_AgainError` for what is to be tried again."""
        seconds = self._timeout_s
        deadline = time.monotonic() + seconds
        content = None if payload is None else json.dumps(payload).encode()  # ASCII, whatever the texts hold
        body = bytearray()
        try:
            with self._client.stream(method, self._url + path, content=content) as response:
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > LARGEST_BODY:
                        raise _AgainError(f"its answer is larger than {LARGEST_BODY >> 10} KiB")
                    if time.monotonic() > deadline:  # the client's own limit is for each read
                        raise _AgainError(f"took longer than judge.timeout_s = {seconds:g} s")
        except httpx2.TimeoutException:
            raise _AgainError(f"took longer than judge.timeout_s = {seconds:g} s") from None
        except httpx2.TransportError as error:
            raise _AgainError(
                f"no connection or a broken one ({self.shown(str(error))}), is it up?"
            ) from None
        except RuntimeError:
            if not self._closed.is_set():  # a closed client says so in this way
                raise
            raise UserError(f"judge {self._url}: closed while requests were under way") from None
        status = response.status_code
        if status == 200:
            return bytes(body)
        said = f"answered {status} {self.shown(bytes(body))}"
        if status == 429 or status >= 500 or 200 < status < 300:
            raise _AgainError(said, _retry_after(response.headers.get("Retry-After", "")))
        if status in (401, 403):
            variable = self._variable
            mend = (
                f"check the key in {variable}" if variable else "name the key's variable in judge.api_key_env"
            )
            self.refuse(f"{said}: {mend}", path)
        if status == 404:
            self.refuse(
                f"{said}: check judge.url (it mostly ends in /v1) and judge.model = {self._model}",
                path,
            )
        if 300 <= status < 400:
            target = self.shown(response.headers.get("Location", ""))
            self.refuse(
                f"answered {status}, a redirect to {target}, which is not followed: give the final judge.url",
                path,
            )
        self.refuse(said, path)

    def refuse(self, problem: str, path: str = "") -> NoReturn:
        """Raises `UserError` of one line that begins with the address and never holds the key."""
        message = f"judge {self._url}{path}: {problem}"
        raise UserError(one_line(message.replace(self._key, "[key]") if self._key else message))

    def shown(self, text: str | bytes) -> str:
        """What a server said, short, escaped, and without the key, should it repeat that."""
        if isinstance(text, bytes):
            text = text[:4096].decode(errors="replace")
        if self._key:
            text = text.replace(self._key, "[key]")
        return repr(text if len(text) <= 80 else f"{text[:79]}…")


class _AgainError(Exception):
    """A request that may go better another time, and how long its server asks to wait."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header, a number or a date, at most LONGEST_RETRY_AFTER_S; 0 for anything else."""
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        seconds = float(value)
    else:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def _check_url(url: str) -> None:
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError):
        raise UserError("judge.url is no address; it must be as http://127.0.0.1:8000/v1") from None
    if parsed.userinfo or parsed.query or parsed.fragment:  # not shown: it may hold the key
        raise UserError(
            "judge.url must have no user, query or fragment; name the key's variable in judge.api_key_env"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(one_line(f"judge.url must be as http://127.0.0.1:8000/v1, got {url!r}"))
    if parsed.path.rstrip("/").endswith("/chat/completions"):
        raise UserError("judge.url must be the base address, without /chat/completions")


def read_key(variable: str, setting: str) -> str:
    """The key in the environment variable that `setting` names, "" for none.

    UserError where it is not there; what may be a key itself is not repeated.
    """
    if not variable:
        return ""
    shown = f"= {variable}" if re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable) else "(not shown, it may be a key)"
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{setting} {shown} must name an environment variable that is set")
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"{setting} {shown}: the key must be printable ASCII without spaces")
    return key
