"""Rollouts from a vLLM server: token ids over HTTP, weights handed over beside it.

The contract is that of vLLM's OpenAI-compatible server and of its weight-transfer routes, versions OLDEST to NEWEST.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.base import Completion, Sampling, places_of
from grpo_fast.engines.faults import EngineError
from grpo_fast.engines.vllm_answers import group_seed, largest_answer, read, request
from grpo_fast.engines.vllm_client import VllmClient
from grpo_fast.engines.vllm_server import VllmServer
from grpo_fast.engines.vllm_weights import CHUNK_BYTES, Parcel, Transfer, chunks
from grpo_fast.errors import UserError

OLDEST, NEWEST = (0, 31), (0, 33)
JOIN_S = 60.0  # for our side of a collective after the server's has succeeded

OnGroup = Callable[[int, list[Completion]], None]
Answered = asyncio.Task[tuple[int, dict[str, Any]]]


class VllmEngine:
    """A `RolloutEngine` over a vLLM server that is running (engine.url) or started here (`server`).

    A completion depends on the weights, its prompt, the sampling and (seed, prompt index, sample index), as far as the
    server's arithmetic is the same in every batch. A call that failed and is made again keeps the groups that came.
    What may pass raises `EngineError`.
    """

    def __init__(
        self,
        settings: EngineSettings,
        transfer: Transfer,
        *,
        server: VllmServer | None = None,
        key: str = "",
        max_rows: int = 256,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Starts the server, if it is ours, and waits for it. `max_rows` bounds the completions asked for at once."""
        self._settings, self._transfer, self._server = settings, transfer, server
        self._key, self._max_rows, self._chunk_bytes = key, max_rows, chunk_bytes
        self._client: VllmClient | None = None
        self._model, self._longest = "", 0
        self._version = -1  # of the weights the server holds
        self._asleep = False
        self._asked: tuple | None = None  # the call that `_groups` are of
        self._groups: dict[int, list[Completion]] = {}
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    # ---- the server ----

    def _connect(self) -> None:
        """Reach the server, look whether it can be used, and prepare the hand-over of weights."""
        if self._server is not None and not self._server.running:
            self._server.start()
        url = self._server.url if self._server else self._settings.url
        key = self._server.key if self._server else self._key
        if self._client is not None:
            self._client.close()
        client = self._client = VllmClient(url, key=key, timeout_s=self._settings.timeout_s)
        self._version, self._asleep = -1, False
        check_version(client)
        with suppress(EngineError):  # left over from a hand-over that was cut off
            if client.call("GET", "/is_paused")["is_paused"]:
                client.call("POST", "/resume")
        served = client.call("GET", "/v1/models")
        try:
            self._model = str(served["data"][0]["id"])
            self._longest = int(served["data"][0]["max_model_len"])
            workers = int(client.call("GET", "/get_world_size")["world_size"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise EngineError("/v1/models: not as vLLM answers it") from None
        self._probe(client)
        greeting = self._transfer.greeting(workers)
        self._post("/init_weight_transfer_engine", {"init_info": greeting.info}, greeting)

    def _probe(self, client: VllmClient) -> None:
        """One token drawn from one: where log-probs are those of the distribution drawn from, its own is 0."""
        sampling = Sampling(max_new_tokens=1, top_k=1)
        payload = request(self._model, [0], 1, sampling, 0)
        [completion] = read(client.call("POST", "/v1/completions", payload), [0], 1, sampling, -1)
        if completion.logprobs.shape != (1,):
            raise EngineError(f"one token was asked for, and log-probs of {len(completion.logprobs)} came")
        if abs(completion.logprobs.item()) > 1e-3:
            client.refuse(
                "its log-probs are not those of the distribution drawn from; start it with --logprobs-mode "
                "processed_logprobs"
            )

    def recover(self) -> None:
        """After a failure: start a server of ours that is dead or deaf anew, and reach it again; it needs a `push`."""
        if self._server is not None and not (self._server.running and self._answers()):
            self._server.stop()
        self._connect()

    @property
    def hint(self) -> str:
        """Where to look when it fails again and again."""
        if self._server is not None:
            return f"see {self._server.log}"
        return f"see that the server at {self._settings.url} is well"

    def _answers(self) -> bool:
        """Whether what generates is well: `/health` is answered in front of it, this behind."""
        assert self._client is not None
        try:
            self._client.call("GET", "/is_paused", timeout_s=10.0)
            return True
        except (EngineError, UserError):
            return False

    # ---- completions ----

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        places: Sequence[int] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Completion]:
        """`n` completions of every prompt, group-major; `on_group` sees the groups in the prompts' order.

        EngineError when no group has ended for engine.timeout_s, and for an answer that cannot be used.
        """
        self._check(prompts, n, sampling)
        self._wake()
        if (held := self._held()) != str(self._version):
            raise EngineError(f"the server holds weights {held!r}, and {self._version} were handed over last")
        seeds = [group_seed(seed, place) for place in places_of(prompts, places)]
        asked = (self._version, n, sampling, tuple(seeds), tuple(map(tuple, prompts)))
        if asked != self._asked:
            self._asked, self._groups = asked, {}
        asyncio.run(self._collect(prompts, n, sampling, seeds, on_group))
        completions = [completion for prompt in range(len(prompts)) for completion in self._groups[prompt]]
        self._asked, self._groups = None, {}
        if self._settings.sleep:
            self.sleep()
        return completions

    async def _collect(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[int],
        on_group: OnGroup | None,
    ) -> None:
        client = self._client
        assert client is not None
        places = asyncio.Semaphore(max(1, self._max_rows // n))

        async def group(prompt: int) -> tuple[int, dict[str, Any]]:
            token_ids = prompts[prompt]
            payload = request(self._model, token_ids, n, sampling, seeds[prompt])
            async with places:
                largest = largest_answer(token_ids, n, sampling)
                return prompt, await client.completion(session, payload, largest=largest)

        due = 0  # the next prompt whose group is handed on
        async with client.session() as session:
            waiting = {asyncio.create_task(group(i)) for i in range(len(prompts)) if i not in self._groups}
            try:
                while due < len(prompts):
                    if due in self._groups:
                        if on_group is not None:
                            self._hand_on(on_group, due)
                        due += 1
                        continue
                    ended, waiting = await asyncio.wait(
                        waiting, timeout=self._settings.timeout_s, return_when=asyncio.FIRST_COMPLETED
                    )
                    if not ended:
                        raise EngineError(
                            f"no group ended within engine.timeout_s = {self._settings.timeout_s:g} s, "
                            f"{len(waiting)} are missing"
                        )
                    problems = [
                        problem for task in ended if (problem := self._keep(task, prompts, n, sampling))
                    ]
                    if problems:
                        raise problems[0]
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    def _keep(
        self, task: Answered, prompts: list[list[int]], n: int, sampling: Sampling
    ) -> BaseException | None:
        """Keep the group that came, or return why none did."""
        try:
            prompt, answer = task.result()
            self._groups[prompt] = read(answer, prompts[prompt], n, sampling, self._version)
        except (EngineError, UserError) as error:
            return error
        return None

    def _hand_on(self, on_group: OnGroup, prompt: int) -> None:
        try:
            on_group(prompt, self._groups[prompt])
        except EngineError:  # refused: it is asked for again, and so is what was not looked at yet
            self._groups = {due: group for due, group in self._groups.items() if due < prompt}
            raise

    def _check(self, prompts: list[list[int]], n: int, sampling: Sampling) -> None:
        if n < 1:
            raise UserError(f"n, the completions per prompt, must be at least 1, got {n}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i} is empty: generation needs at least one token to start from")
            if len(prompt) + sampling.max_new_tokens > self._longest:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens, with rollout.max_new_tokens = {sampling.max_new_tokens} "
                    f"more than the server's {self._longest}: start it with a larger --max-model-len"
                )

    # ---- weights ----

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand the weights over, chunk by chunk, while the server pauses; nothing of the old ones stays cached."""
        self._wake()
        self._post("/pause", params={"mode": "abort", "clear_cache": "true"})
        try:
            self._post("/start_weight_update")
            for chunk in chunks(named_parameters, self._chunk_bytes):
                parcel = self._transfer.parcel(chunk)
                self._post("/update_weights", {"update_info": parcel.info}, parcel)
            self._post("/finish_weight_update", {"weight_version": str(version)})
            self._transfer.finish()
            if self._post("/reset_prefix_cache").get("success") is False:
                raise EngineError("/reset_prefix_cache: the server keeps what it cached of the old weights")
            self._post("/resume")
            if (held := self._held()) != str(version):
                raise EngineError(f"weights {version} were handed over, and the server holds {held!r}")
        except BaseException:
            self._leave_update()
            raise
        self._version = version

    def _held(self) -> Any:
        """The version of the weights by the server's account."""
        assert self._client is not None
        return self._client.call("GET", "/weight_info").get("weight_version")

    def _leave_update(self) -> None:
        """Let the server go on after a hand-over that failed; its weights count as none of ours."""
        self._version = -1
        self._transfer.finish()
        for path in ("/finish_weight_update", "/resume"):
            with suppress(EngineError, UserError):
                self._post(path, timeout_s=10.0)

    def _post(
        self,
        path: str,
        payload: dict[str, Any] | None = None,
        parcel: Parcel | None = None,
        *,
        params: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """A request, and beside it what must happen here at the same time."""
        client = self._client
        assert client is not None
        if parcel is None or parcel.meanwhile is None:
            return client.call("POST", path, payload, params=params, timeout_s=timeout_s)
        ours = _Beside(parcel.meanwhile)
        answer = client.call("POST", path, payload, params=params, timeout_s=timeout_s)
        ours.join(JOIN_S)
        return answer

    # ---- sharing a GPU ----

    def sleep(self) -> None:
        """Let the server move its weights to the host and drop its cache; the next call wakes it."""
        if not self._asleep:
            self._post("/sleep", params={"level": "1", "mode": "abort"})
            self._asleep = True

    def wake(self) -> None:
        """Have its memory back."""
        self._wake()

    def _wake(self) -> None:
        if self._asleep:
            self._post("/wake_up")
            self._asleep = False

    def close(self) -> None:
        """Stop a server that was started here, and leave one that was running as it was found."""
        self._transfer.close()
        if self._client is not None:
            if self._server is None and self._asleep:
                with suppress(EngineError, UserError):
                    self._wake()
            self._client.close()
        if self._server is not None:
            self._server.stop()


class _Beside:
    """A call in a thread that may hang for ever: it is waited for, not relied upon."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def join(self, timeout_s: float) -> None:
        """Its end; EngineError when it does not come, and what it raised."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise EngineError(f"the server has taken the weights, our side of it hangs for {timeout_s:g} s")
        if self._error is not None:
            raise self._error


def check_version(client: VllmClient) -> None:
    """UserError for a vLLM whose contract is another."""
    said = client.call("GET", "/version").get("version")
    found = re.match(r"(\d+)\.(\d+)", said) if isinstance(said, str) else None
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    if found is None:
        client.refuse(f"says its version is {said!r}; it must be vLLM {oldest} to {newest}")
    if not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        client.refuse(
            f"is vLLM {said}, and its contract is known from {oldest} to {newest}: run one of these"
        )
