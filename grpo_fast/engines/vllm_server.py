"""A vLLM server started for a run: its command, its log, and its end with ours."""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.data.records import one_line
from grpo_fast.engines.faults import EngineError
from grpo_fast.errors import UserError

STOP_S = 10.0  # between asking it to end and killing it
GONE_S = 2.0  # for what was killed to be gone; where nobody collects orphans, their entries stay
# Runs the words after it, and ends their process group when standard input does: with this process, however it ends.
_KEEPER = """
exec 3<&0
trap : TERM
"$@" </dev/null 3<&- & server=$!
{ trap '' TERM; read -r _ <&3; kill -TERM 0; sleep 5; kill -KILL 0; } &
exec 3<&-
wait $server; code=$?
while kill -0 $server 2>/dev/null; do wait $server; code=$?; done
exit $code
"""
POLL_S = 0.2
_OURS = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "TRITON_INTERPRET",
)  # of this environment, not of the server's


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a started server serves."""

    model: str
    """Folder or hub id of the model it reads at first; the policy's weights are put over it."""
    dtype: str
    max_model_len: int
    """Tokens of prompt and completion together."""
    max_num_seqs: int
    """Completions generated at the same time."""
    seed: int
    transfer: str
    """ipc or nccl."""
    devices: str
    """CUDA_VISIBLE_DEVICES of the server; empty: as it is here."""


class VllmServer:
    """A process of its own, in a process group of its own; `stop` or the end of this process ends it."""

    def __init__(self, settings: EngineSettings, serving: Serving, log: Path) -> None:
        """Starts nothing yet; UserError for a program that is not there."""
        self._settings, self._serving, self.log = settings, serving, log
        self._program = find_program(settings.executable)
        self._process: subprocess.Popen | None = None
        self.key = secrets.token_hex(16)  # other users of this machine have no business there
        self.url = ""

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it on a free port and wait until it answers.

        EngineError, with the last lines of its log, when it ends before that or takes longer than
        engine.start_timeout_s; it is stopped then.
        """
        self.stop()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [
                        "/bin/sh",
                        "-c",
                        _KEEPER,
                        "vllm",
                        *command(self._program, self._settings, self._serving, port),
                    ],
                    stdin=subprocess.PIPE,  # never written to
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C is for this process; it ends the server itself
                )
            except OSError as error:
                raise UserError(
                    f"engine.executable: cannot start {self._program}: {error.strerror or error}"
                ) from None
        atexit.register(self.stop)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        limit = self._settings.start_timeout_s
        deadline = time.monotonic() + limit
        # plain HTTP to this machine: nothing to verify
        with httpx2.Client(trust_env=False, timeout=5.0, verify=False) as client:
            while time.monotonic() < deadline:
                if self._process is None or self._process.poll() is not None:
                    code = self._process.returncode if self._process else None
                    raise EngineError(
                        f"{self._program} ended with exit code {code} before it answered; {self.last_lines()}"
                    )
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx2.HTTPError:
                    pass
                time.sleep(POLL_S)
        raise EngineError(
            f"{self._program} did not answer within engine.start_timeout_s = {limit:g} s; {self.last_lines()}"
        )

    def stop(self) -> None:
        """End the whole process group; nothing of it is left afterwards."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        _signal_group(
            process.pid, signal.SIGKILL
        )  # the keeper's watch, and workers that outlived their parent
        process.wait()
        deadline = time.monotonic() + GONE_S
        while _signal_group(process.pid, 0) and time.monotonic() < deadline:  # killed, and not yet gone
            time.sleep(0.01)
        if process.stdin is not None:
            process.stdin.close()

    def last_lines(self, count: int = 3) -> str:
        """The end of its log in one line, and where the rest is."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        except OSError:
            lines = []
        said = one_line(" | ".join([line for line in lines if line][-count:])).replace(self.key, "[key]")
        return f"the end of {self.log}: {said or 'nothing'}"

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in _OURS}
        environment["PATH"] = os.pathsep.join([os.path.dirname(self._program), environment.get("PATH", "")])
        environment |= {
            "VLLM_SERVER_DEV_MODE": "1",  # weight transfer, sleep and cache routes
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # memory handles arrive pickled; loopback only
            "VLLM_API_KEY": self.key,
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self._serving.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._serving.devices
        return environment


def command(program: str, settings: EngineSettings, serving: Serving, port: int) -> list[str]:
    """The words that start the server."""
    words = [program, "serve", serving.model, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--served-model-name", "policy", "--dtype", serving.dtype, "--seed", str(serving.seed)]
    words += ["--max-model-len", str(serving.max_model_len), "--max-num-seqs", str(serving.max_num_seqs)]
    # Log-probs of the distribution a token was drawn from, and no defaults of the model's generation config.
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    words += ["--weight-transfer-config", json.dumps({"backend": serving.transfer})]
    words += ["--gpu-memory-utilization", f"{settings.gpu_memory_utilization:g}"]
    words += ["--enable-sleep-mode"] * settings.sleep
    for option in settings.options:
        name, equals, value = option.partition("=")
        words += [f"--{name}", *([value] if equals else [])]
    return words


def find_program(executable: str) -> str:
    """The path of the program; UserError when it is not there or cannot be run."""
    found = shutil.which(os.path.expanduser(executable))
    if found is None:
        state = "cannot be run" if Path(executable).expanduser().exists() else "is not there"
        raise UserError(
            f"engine.executable: {executable} {state}; it must be the vllm program of an environment with vLLM, as "
            "/path/to/venv/bin/vllm"
        )
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _signal_group(group: int, number: int) -> bool:
    """Whether there was somebody to send it to; signal 0 only asks."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False
