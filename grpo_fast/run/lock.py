"""One process at a time writes into a run's folder."""

import os
import shutil
import socket
from io import FileIO
from pathlib import Path

from grpo_fast.errors import UserError
from grpo_fast.run.inside import refuse_links

try:
    import fcntl
except ImportError:  # no POSIX: nobody is kept out
    fcntl = None

LOCK = ".lock"
"""The file that is held; what stands in it is for whoever comes second."""


def hold(run_dir: Path) -> FileIO:
    """The open lock of a run's folder: its closing lets go, and so does the end of this process, however it ends.

    UserError, with the other's number, where another process holds it. File systems that know no locks keep nobody out.
    """
    path = run_dir / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    file = FileIO(descriptor, "r+")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            holder = file.read(200).decode(errors="replace").strip() or "another process"
        raise UserError(
            f"run folder {run_dir} is in use by {holder}: stop that one, or wait until it has ended"
        ) from None
    except OSError:
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def begin(run_dir: Path, config_toml: str) -> FileIO:
    """The lock of a new run's folder, which appears with its `config.toml` or not at all; UserError where it exists."""
    aside = run_dir.with_name(f".{run_dir.name}.new-{os.getpid()}")
    try:
        if run_dir.exists() or run_dir.is_symlink():
            raise UserError(f"run folder {run_dir} already exists; go on with it: --resume {run_dir}")
        shutil.rmtree(aside, ignore_errors=True)  # of a process of this number that was killed
        aside.mkdir(parents=True)
        lock = hold(aside)
        with (aside / "config.toml").open("x", encoding="utf-8") as file:
            file.write(config_toml)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(run_dir)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"cannot create run folder {run_dir}: {error.strerror or error}") from error
    return lock


def take_over(run_dir: Path) -> FileIO:
    """The lock of a run's folder (`hold`), before anything in it is looked at: what another process has yet to
    write would be missed. UserError where there is no run."""
    if not (run_dir / "config.toml").is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.toml")
    refuse_links(run_dir)
    return hold(run_dir)
