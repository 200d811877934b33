"""The folder of a run and what is written into it while the run goes on.

`metrics.jsonl` (one JSON object a step), `samples.jsonl`, `summary.json` and TensorBoard events; Weights &
Biases when asked. `RunLogger` writes them, `read_rows` and `read_summary` read them back.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from grpo_fast.errors import UserError
from grpo_fast.run.follow import ENDING, note_ending
from grpo_fast.run.lock import begin, take_over
from grpo_fast.run.progress import PHASES
from grpo_fast.run.shapes import METRICS, SAMPLES, SUMMARY, Shape, is_finite, parsed
from grpo_fast.typed import is_list, is_mapping, is_tuple

_CLOCK_KEYS = ("time_s", "tokens_per_s", "memory_gib")


class RunLogger:
    """Writes a run's folder; a context manager. Make one with `create` or `resume`.

    A run that fails before anything was logged takes its folder away again.
    """

    def __init__(
        self,
        path: Path,
        *,
        wandb_project: str | None,
        phase: str,
        step: int,
        new: bool,
        earlier: Sequence[dict[str, Any]] = (),
        made_parent: bool = False,
        rewind: Callable[[], None] | None = None,
        lock: FileIO,
    ) -> None:
        """Use `create` or `resume`."""
        self.path = path
        self._lock = lock
        self.phase_s: dict[str, float] = {}
        self._untouched = new
        self._made_parent = made_parent
        self._rewind = rewind
        self._step_phase_s: dict[str, float] = {}
        self._running: list[str] = []  # names of the phase timers now open, outermost first
        for row in earlier:
            for key, value in row.items():
                if key.startswith("time/") and key != "time/step_s" and is_finite(value):
                    name = key.removeprefix("time/").removesuffix("_s")
                    self.phase_s[name] = self.phase_s.get(name, 0.0) + value
        now = time.perf_counter()
        self._start = now - ((earlier[-1].get("time_s") or 0.0) if earlier else 0.0)
        self._mark = self._last_step = now
        self._files: dict[str, FileIO] = {}
        self._tensorboard: dict[str, Any] = {}
        self._resumed_at = (phase, step) if not new else None
        self._rows = len(earlier)
        self._wandb = _start_wandb(wandb_project, path, resume=not new) if wandb_project else None

    @classmethod
    def create(
        cls, run_dir: Path | str, *, config_toml: str, wandb_project: str | None = None
    ) -> "RunLogger":
        """Make the folder of a new run with its `config.toml`; UserError when it exists."""
        path = Path(run_dir)
        if wandb_project:
            _import_wandb()
        made_parent = not path.parent.exists()
        lock = begin(path, config_toml)
        return cls(
            path,
            wandb_project=wandb_project,
            phase=PHASES[0],
            step=0,
            new=True,
            made_parent=made_parent,
            lock=lock,
        )

    @classmethod
    def resume(
        cls,
        run_dir: Path | str,
        *,
        phase: str,
        step: int,
        config_toml: str | None = None,
        wandb_project: str | None = None,
        lock: FileIO | None = None,
    ) -> "RunLogger":
        """Go on with a run from a checkpoint taken after `step` of `phase`, with `config_toml` from there on.

        What the run had logged after that point is removed, so that a resumed run's metrics read like those of a run
        that was never interrupted: with the first thing that is written, and not before. `lock`: from `take_over`, by
        whoever looked at the checkpoints.
        """
        path = Path(run_dir)
        if wandb_project:
            _import_wandb()
        lock = lock or take_over(path)
        reached = (PHASES.index(phase), step)
        metrics = [row for row in read_rows(path / "metrics.jsonl", METRICS) if _place(row) <= reached]
        samples = [row for row in read_rows(path / "samples.jsonl", SAMPLES) if _kept_sample(row, reached)]

        def rewind() -> None:
            for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
                write_atomically(path / name, "".join(map(_json_line, rows)))
            for ended in ("summary.json", ENDING):
                (path / ended).unlink(missing_ok=True)
            if config_toml is not None:
                write_atomically(path / "config.toml", config_toml)

        return cls(
            path,
            wandb_project=wandb_project,
            phase=phase,
            step=step,
            new=False,
            earlier=metrics,
            rewind=rewind,
            lock=lock,
        )

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is not None and not self._rewind:  # a resume that is refused changes nothing
            note_ending(self.path, error)
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Close every file and let the folder go; TensorBoard and W&B are flushed."""
        for file in self._files.values():
            file.close()
        try:
            for writer in self._tensorboard.values():
                writer.close()
        except OSError as error:
            if not failed:  # else the error on its way says more
                raise UserError(f"cannot write {self.path}/tensorboard: {error.strerror or error}") from error
        finally:
            self._lock.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))
        if failed and self._untouched:
            shutil.rmtree(self.path, ignore_errors=True)
            if self._made_parent:
                with suppress(OSError):  # another run is in there by now
                    self.path.parent.rmdir()

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, those before a resume included (and the pause between them not)."""
        return time.perf_counter() - self._start

    def step(self, phase: str, step: int, scalars: Mapping[str, Any]) -> dict[str, Any]:
        """Log one step and return its row: the scalars, `time_s`, and the phase timers as `time/<name>_s`.

        Values may be numbers or 0-d tensors; NaN and infinities become null.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {PHASES}, got {phase!r}")
        self._charge()
        now = time.perf_counter()
        times = {f"time/{name}_s": round(value, 6) for name, value in self._step_phase_s.items()}
        row = {
            "phase": phase,
            "step": step,
            "time_s": round(now - self._start, 6),
            **{key: _plain(value) for key, value in scalars.items()},
            **times,
            "time/step_s": round(now - self._last_step, 6),
        }
        self._step_phase_s, self._last_step = {}, now
        self._append("metrics.jsonl", [row])
        self._rows += 1
        try:
            writer = self._writer(phase)
            for key, value in row.items():
                if key not in ("phase", "step") and isinstance(value, int | float):
                    writer.add_scalar(key, value, step)
        except OSError as error:
            raise UserError(f"cannot write {self.path}/tensorboard: {error.strerror or error}") from error
        if self._wandb:
            prefixed = {f"{phase}/{key}": value for key, value in row.items() if key not in ("phase", "step")}
            self._wandb.log({**prefixed, f"{phase}/step": step}, step=self._rows)
        return row

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append completions: `when` ("before", "after", "step"), `step`, `prompt`, `completion`, `scores`,
        `judge` (or None), `kind` (or None), `finish_reason`."""
        self._append("samples.jsonl", rows)

    def sync(self) -> None:
        """What was logged reaches the disk: before a checkpoint does, whose steps it is of."""
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror or error}") from error

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json`, whole or not at all. `wall_s` and `phase_s` are filled in when not given."""
        self._append("metrics.jsonl", [])
        filled = {"wall_s": round(self.wall_s, 3), "phase_s": self.rounded_phases(), **values}
        text = json.dumps(finite(filled), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / "summary.json", text + "\n")

    def rounded_phases(self) -> dict[str, float]:
        """Seconds spent under each phase timer so far, in milliseconds' precision."""
        return {name: round(value, 3) for name, value in self.phase_s.items()}

    @contextmanager
    def phase_timer(self, name: str) -> Generator[None, None, None]:
        """Count the seconds of the block towards phase `name`.

        Blocks may nest: each second counts once, for the innermost. A CUDA device in use is synchronised at
        both ends, so that work still queued is not counted for the next phase.
        """
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        """Give the seconds since the last mark to the innermost open phase."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            for totals in (self.phase_s, self._step_phase_s):
                totals[self._running[-1]] = totals.get(self._running[-1], 0.0) + now - self._mark
        self._mark = now

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append whole lines, or, when the disk refuses, none of them."""
        if self._rewind:
            self._rewind()
            self._rewind = None
        if name not in self._files:
            self._files[name] = (self.path / name).open("ab", buffering=0)
        file = self._files[name]
        data = memoryview("".join(map(_json_line, rows)).encode())
        end = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(end)
            raise UserError(f"cannot write {file.name}: {error.strerror or error}") from error
        self._untouched = False

    def _writer(self, phase: str) -> Any:
        """TensorBoard's writer of this phase (one each: every phase counts its steps from 1)."""
        if phase not in self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            resumed = self._resumed_at and self._resumed_at[0] == phase
            purge = self._resumed_at[1] + 1 if self._resumed_at and resumed else None
            self._tensorboard[phase] = SummaryWriter(str(self.path / "tensorboard" / phase), purge_step=purge)
        return self._tensorboard[phase]


def read_rows(path: Path | str, shape: Shape | None = None) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, held against `shape`; [] when there is none.

    A last line that was cut off (the process was killed while it wrote) is left out; any other broken line
    raises UserError with its number.
    """
    path = Path(path)
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"{path} is no file")
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parsed(line, shape)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: expected one JSON object ({error}); mend the line or take it out"
            ) from error
        rows.append(row)
    return rows


def read_summary(run_dir: Path | str) -> dict[str, Any] | None:
    """`summary.json` of a run, or None when the run has not written one."""
    path = Path(run_dir) / "summary.json"
    if not path.exists():
        return None
    try:
        return parsed(path.read_bytes(), SUMMARY)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON object ({error})") from error


def reproducible(row: Mapping[str, Any]) -> dict[str, Any]:
    """A metrics row without clock and memory: what two runs of one seed must agree on."""
    return {
        key: value
        for key, value in row.items()
        if key not in _CLOCK_KEYS and not key.startswith(("time/", "compile/"))
    }


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one rename; UserError, and the old content, when that fails."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # of a process of this number that was killed, or a link
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def peak_memory_gib() -> float:
    """Peak memory in GiB: what PyTorch held on the CUDA devices in use, else this process's resident set."""
    if torch.cuda.is_initialized():
        return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    return PHASES.index(row["phase"]), row["step"]


def _kept_sample(row: Mapping[str, Any], reached: tuple[int, int]) -> bool:
    """All samples are of the last phase; the one after training is never older than a checkpoint."""
    return row.get("when") != "after" and (len(PHASES) - 1, row.get("step") or 0) <= reached


def _plain(value: Any) -> Any:
    """A number that JSON has, or None for NaN and infinities; strings, bools and None as they are."""
    if isinstance(value, torch.Tensor) or hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite(value: Any) -> Any:
    if is_mapping(value):
        return {str(key): finite(item) for key, item in value.items()}
    if is_list(value) or is_tuple(value):
        return [finite(item) for item in value]
    return _plain(value)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def _import_wandb() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "logging to Weights & Biases needs the wandb package: pip install wandb, or leave run.wandb off"
        ) from error
    return wandb


def _start_wandb(project: str, path: Path, *, resume: bool) -> Any:
    return _import_wandb().init(
        project=project, name=path.name, id=path.name, dir=str(path), resume="allow" if resume else None
    )
