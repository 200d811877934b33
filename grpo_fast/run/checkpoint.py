"""Checkpoints that are either whole or not there: `checkpoints/step-000123/`.

A checkpoint is a folder of safetensors files (one a group of tensors), `state.json` (everything that is not
a tensor) and `manifest.json` (size and sha256 of each file), which is written last. The folder is built under
a temporary name beside its place, every file is fsynced, and one rename makes it appear; a process killed at
any moment leaves the older checkpoints as they were. Nothing is ever pickled or unpickled.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo_fast import __version__
from grpo_fast.errors import UserError
from grpo_fast.run.inside import refuse_links
from grpo_fast.typed import is_dict

FORMAT = "grpo_fast checkpoint"
FORMAT_VERSION = 1
SHARDS_VERSION = 2  # written by several processes (run/shards.py)
_FOLDER = re.compile(r"step-(\d{6,})")
_GROUP = re.compile(r"[A-Za-z0-9_]+")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Groups = dict[str, dict[str, Tensor]]


def save(
    run_dir: Path | str,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    kind: str = "checkpoints",
) -> Path:
    """Write `run_dir/<kind>/step-<step>` and return it; of the older ones the last `keep - 1` stay.

    `tensors` maps a group ("model", "optimizer") to its named tensors, on any device; they are written one at
    a time, so the host never holds a second copy of the model. Names that share one tensor (tied weights) are
    stored once and share one tensor again after `load`. `state` must survive JSON: string keys, lists for
    tuples. A full disk, or any other write error, raises UserError and leaves every older checkpoint.
    """
    if keep < 1:
        raise UserError(f"checkpoints to keep must be at least 1, got {keep}")
    if bad := [name for name in tensors if not _GROUP.fullmatch(name)]:
        raise ValueError(f"a group name must be letters, digits and underscores, got {bad[0]!r}")
    state_text = json.dumps(state, indent=1)
    folder = Folder(Path(run_dir), step, kind)
    try:
        folder.begin()
        files: dict[str, dict[str, Any]] = {}
        aliases: dict[str, dict[str, str]] = {}
        for group, named in tensors.items():
            unique, aliases[group] = without_aliases(named)
            files[f"{group}.safetensors"] = _write(
                folder.aside / f"{group}.safetensors", _safetensors(unique)
            )
        folder.seal(files, aliases, state_text, keep=keep)
    except OSError as error:
        raise UserError(save_failure(error, folder.target, _bytes_of(tensors))) from error
    finally:
        shutil.rmtree(folder.aside, ignore_errors=True)
    return folder.target


class Folder:
    """The folder of one checkpoint while it is built: under a hidden name, until everything in it is on the disk."""

    def __init__(self, run_dir: Path, step: int, kind: str = "checkpoints") -> None:
        self.parent, self.step = run_dir / kind, step
        self.target = self.parent / f"step-{step:06d}"
        self.aside = self.parent / f".step-{step:06d}.tmp"

    def begin(self) -> None:
        """Make the hidden folder; what a process that was killed while it saved has left is put back or goes away."""
        if not self.parent.is_dir():
            self.parent.mkdir(parents=True)
            # else a power cut could take every checkpoint with the folder's name
            fsync_folder(self.parent.parent)
        refuse_links(self.parent.parent)
        for replaced in self.parent.glob(".step-*.replaced"):
            place = self.parent / replaced.name.removeprefix(".").removesuffix(".replaced")
            if place.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(place)
        for leftover in self.parent.glob(".step-*.tmp*"):
            shutil.rmtree(leftover)
        self.aside.mkdir()

    def seal(
        self,
        files: Mapping[str, Mapping[str, Any]],
        aliases: Mapping[str, Mapping[str, str]],
        state_text: str,
        *,
        keep: int,
        version: int = FORMAT_VERSION,
    ) -> None:
        """Write `state.json` and, last, the manifest, and give the folder its name; `keep - 1` older ones stay."""
        entries = {**files, "state.json": _write(self.aside / "state.json", [state_text.encode()])}
        manifest = {
            "format": FORMAT,
            "format_version": version,
            "project_version": __version__,
            "step": self.step,
            "files": entries,
            "aliases": aliases,
        }
        _write(self.aside / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        fsync_folder(self.aside)
        replaced = self.parent / f".step-{self.step:06d}.replaced"
        if self.target.exists():  # the same step saved again: the new one takes its place
            shutil.rmtree(replaced, ignore_errors=True)
            self.target.rename(replaced)
        self.aside.rename(self.target)
        fsync_folder(self.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in [path for path in folders(self.parent) if path != self.target][: -(keep - 1) or None]:
            shutil.rmtree(old, ignore_errors=True)


def latest(run_dir: Path | str) -> Path | None:
    """The newest checkpoint folder of a run, or None. It is not verified here: `load` does that."""
    found = folders(Path(run_dir) / "checkpoints")
    return found[-1] if found else None


def load(path: Path | str, device: torch.device | str = "cpu") -> tuple[Groups, dict[str, Any]]:
    """Verify a checkpoint and read it: `(groups, state)` as they were given to `save`, tensors on `device`.

    Anything that is not exactly what `save` wrote raises UserError: a file that is missing, truncated or
    altered, a folder that another program or another format version wrote.
    """
    path = Path(path)
    check(path)
    manifest = json.loads((path / "manifest.json").read_text())
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} is in shards: run.shards reads it")
    groups: Groups = {}
    for group, aliases in manifest["aliases"].items():
        file = path / f"{group}.safetensors"
        try:
            # safe_open has no types
            with cast(Any, safe_open(file, framework="pt", device=str(device))) as opened:
                names: list[str] = opened.keys()
                named: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise UserError(f"{file}: not a readable safetensors file ({error})" + _way_out(path)) from error
        try:
            named.update({alias: named[original] for alias, original in aliases.items()})
        except (AttributeError, KeyError, TypeError):
            raise UserError(
                f"{path}: its manifest names tied weights that are not there" + _way_out(path)
            ) from None
        groups[group] = named
    return groups, read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint that is whole; UserError where it is not what `save` writes."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not is_dict(state):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path / 'state.json'}: cannot be read ({_one_line(error)})" + _way_out(path)
        ) from error
    return state


def check(path: Path) -> None:
    """UserError, with the way out, where a checkpoint is not whole."""
    if problem := verify(path):
        raise UserError(problem + _way_out(path))


def verify(path: Path | str) -> str | None:
    """None when the checkpoint is whole, else one line: which file, what was expected, what is there."""
    path = Path(path)
    if not path.is_dir():
        return f"{path}: expected a checkpoint folder, found {'a file' if path.exists() else 'nothing'}"
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        return f"{file}: missing, so this folder is not a checkpoint"
    except (OSError, ValueError, RecursionError) as error:
        return f"{file}: expected the checkpoint's JSON manifest, cannot read it ({_one_line(error)})"
    if not is_dict(manifest) or manifest.get("format") != FORMAT:
        return f"{file}: expected format {FORMAT!r}, found another program's file"
    if manifest.get("format_version") not in (FORMAT_VERSION, SHARDS_VERSION):
        return (
            f"{file}: expected format version {FORMAT_VERSION} or {SHARDS_VERSION}, "
            f"found {manifest.get('format_version')!r} (written by grpo_fast {manifest.get('project_version')!r})"
        )
    try:
        expected: dict[str, tuple[int, str]] = {
            name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
        listed = {f"{group}.safetensors" for group in manifest["aliases"]} | {"state.json"}
        if manifest["format_version"] == SHARDS_VERSION:
            listed = {str(name) for name in expected if str(name).endswith(".safetensors")} | {"state.json"}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return f"{file}: expected a list of files with size and sha256, found something else"
    if listed != set(expected):
        return f"{file}: expected the files {sorted(listed)}, found {sorted(expected)}"
    for name, (size, sha256) in expected.items():
        part = path / name
        if Path(name).name != name or not part.is_file() or part.is_symlink():
            return f"{part}: missing, expected {size} bytes"
        if (found := part.stat().st_size) != size:
            return f"{part}: expected {size} bytes, found {found} (truncated or overwritten)"
        with part.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != sha256:
            return f"{part}: corrupt, expected sha256 {sha256[:12]}…, found {digest[:12]}…"
    return None


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A torch optimizer's `state_dict()` as (named tensors for a group, plain JSON for the state).

    Tensor `exp_avg` of parameter 3 becomes "3.exp_avg"; whatever is no tensor goes into the JSON part.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, values in state_dict["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{parameter}.{name}"] = value
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return tensors, {"param_groups": groups, "scalars": scalars}


def unflatten_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`, ready for `optimizer.load_state_dict`.

    Step counters come back on the CPU, where torch keeps them; a fused optimizer moves them itself.
    """
    state: dict[int | str, dict[str, Any]] = {}
    for flat, value in [*tensors.items(), *plain["scalars"].items()]:
        key, _, name = flat.rpartition(".")
        if name == "step" and isinstance(value, Tensor):
            value = value.cpu()
        state.setdefault(int(key) if key.isdigit() else key, {})[name] = value
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in plain["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def folders(parent: Path) -> list[Path]:
    """The folders of steps in `parent`, oldest first; links that lead elsewhere are none."""
    found = [
        path
        for path in parent.glob("step-*")
        if _FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def without_aliases(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split into tensors to store and {alias: stored name} for names of one and the same memory."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in named.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        original = first.setdefault(key, name) if tensor.numel() else name
        if original == name:
            unique[name] = tensor
        else:
            aliases[name] = original
    return unique, aliases


def _safetensors(named: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece.

    Written here rather than by the library so that one tensor at a time leaves the device, the checksum is
    taken on the way, and a full disk is an OSError.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in named.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in named.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _write(path: Path, pieces: Iterator[bytes | memoryview] | list[bytes]) -> dict[str, Any]:
    """Write and fsync one file; its entry of the manifest."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def fsync_folder(path: Path) -> None:
    """The folder's own entries reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_failure(error: OSError, target: Path, needed: int) -> str:
    """What is said when a checkpoint of `needed` bytes could not be written."""
    room = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next(path for path in [target, *target.parents] if path.exists())
        free = shutil.disk_usage(existing).free
        room = f" (needs {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free)"
    newest = latest(target.parent.parent)
    kept = (
        f"the checkpoints before it are intact, newest {newest}"
        if newest
        else "there is no earlier checkpoint"
    )
    return f"cannot save checkpoint {target}: {error.strerror or error}{room}; {kept}"


def _bytes_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    unique = [without_aliases(named)[0] for named in tensors.values()]
    return sum(tensor.numel() * tensor.element_size() for named in unique for tensor in named.values())


def _way_out(path: Path) -> str:
    """The end of an error line: which older checkpoint can be used instead, and how."""
    run_dir = path.parent.parent
    older = [other for other in folders(Path(run_dir) / "checkpoints") if other.name != path.name]
    good = next((other for other in reversed(older) if verify(other) is None), None)
    if good is None:
        return "; no other checkpoint of this run is whole"
    if not path.exists():
        return f"; {good} is whole: continue from it with --resume {run_dir}"
    return f"; {good} is whole: remove {path} and continue from there with --resume {run_dir}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
