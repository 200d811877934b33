"""Faults that a fuzzer must notice: each of its ways to notice is held against one."""

from __future__ import annotations

import os
import time
from pathlib import Path

from grpo_fast.errors import UserError
from tests.fuzz.target import Target


def _raises(data: bytes, folder: Path) -> None:
    raise KeyError("undeclared")


def _hangs(data: bytes, folder: Path) -> None:
    time.sleep(60)


def _dies(data: bytes, folder: Path) -> None:
    os._exit(9)


def _grows(data: bytes, folder: Path) -> None:
    bytearray(1 << 40)


def _escapes(data: bytes, folder: Path) -> None:
    (folder.parent / "escaped").write_bytes(data)


def _refuses(data: bytes, folder: Path) -> None:
    raise UserError("declared \x1b[31m")


def _target(run, **given) -> Target:
    return Target(run=run, corpus=lambda: [b"sound"], limit_s=0.3, **given)


PLANTED = {
    "raises": _target(_raises),
    "hangs": _target(_hangs),
    "dies": _target(_dies),
    "grows": _target(_grows),
    "escapes": _target(_escapes),
    "refuses": _target(_refuses),
}
