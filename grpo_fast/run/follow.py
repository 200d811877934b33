"""Reading a run's folder while another process writes it: new lines of its logs, and how the run stands."""

from __future__ import annotations

import json
import math
import os
import stat
import time
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_fast.errors import UserError
from grpo_fast.shown import error_line

ENDING = "ending.txt"
"""How a run ended that did not finish, one line: stopped, or failed: and why. Gone again once it goes on."""
_REMEMBERED = 64
"""Bytes before the place a file was read to, by which a file that was written anew is known."""
_LONGEST = 1 << 26
"""Bytes of one look, and of a line that is worth waiting for."""


class Tail:
    """The whole lines of a growing .jsonl file that have come since the last look, read on from there.

    A last line that is only half written waits. Lines that are no JSON object are left out and counted in `broken`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = 0
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._file, self._place, self._before, self._half = -1, 0, b"", b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """(new rows, whether they are those of a file that was truncated or replaced, from its beginning)."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # opening a pipe would wait for a writer
                return [], False
            with self.path.open("rb") as file:
                number, anew = os.fstat(file.fileno()).st_ino, False
                if self._place:
                    file.seek(self._place - len(self._before))
                    anew = number != self._file or file.read(len(self._before)) != self._before
                if anew:
                    self._begin_anew()
                file.seek(self._place)
                data = file.read(_LONGEST)
        except OSError:
            return [], False
        self._file = number
        self._place += len(data)
        self._before = (self._before + data)[-_REMEMBERED:]
        *lines, self._half = (self._half + data).split(b"\n")
        if len(self._half) > _LONGEST:
            self._half = b"\n"  # the rest of that line will be no JSON
        return list(self._objects(lines)), anew

    def _objects(self, lines: list[bytes]) -> Iterable[dict[str, Any]]:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                self.broken += 1


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands, as far as its folder tells."""

    state: Literal["running", "silent", "finished", "stopped", "failed"]
    age_s: float
    """Seconds since anything in the folder was written"""
    why: str = ""
    """failed: what ended it"""

    @property
    def over(self) -> bool:
        """Whether nothing more will come unless the run is resumed."""
        return self.state in ("finished", "stopped", "failed")


def standing(folder: Path, *, patience_s: float) -> Standing:
    """How the run stands; silent is one that has written nothing for `patience_s` and has not said that it ended.

    A process that was killed says nothing: only its silence tells.
    """
    age = max(0.0, time.time() - _last_write(folder))
    status = _json_object(folder / "summary.json").get("status")
    if status == "finished":
        return Standing(state="finished", age_s=age)
    with suppress(OSError):
        _, _, why = (folder / ENDING).read_text(encoding="utf-8", errors="replace").partition(":")
        return Standing(state="failed" if why else "stopped", age_s=age, why=why.strip())
    if status == "interrupted":
        return Standing(state="stopped", age_s=age)
    return Standing(state="silent" if age > patience_s else "running", age_s=age)


def note_ending(folder: Path, error: BaseException | None = None) -> None:
    """Leave behind, for whoever looks at the folder, that the run was stopped, or by what `error` it failed."""
    said = "stopped"
    if isinstance(error, KeyboardInterrupt):
        said = "failed: interrupted in the middle of a step: the last checkpoint counts"
    elif error is not None:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        said = f"failed: {error_line(f'{kind}{error}')}"
    with suppress(OSError):  # a full disk may be what ended it
        (folder / ENDING).write_text(" ".join(said.split()) + "\n", encoding="utf-8", errors="replace")


def check_run_folder(folder: Path) -> None:
    """UserError where there is no run."""
    if not (folder / "config.toml").is_file():
        found = "no config.toml" if folder.is_dir() else ("a file" if folder.exists() else "nothing")
        raise UserError(f"{folder}: expected the folder of a run, found {found}")


def settings_of(folder: Path) -> dict[str, Any]:
    """The tables of the run's config.toml; {} where it cannot be read."""
    try:
        return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def number(value: Any) -> float | None:
    """The value as a finite float, None where it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _last_write(folder: Path) -> float:
    times = [0.0]
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                times.append(entry.stat(follow_symlinks=False).st_mtime)
    return max(times)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
