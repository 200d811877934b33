"""Checkpoints that several processes write together, and reading any checkpoint on any number of processes.

`torch.distributed.checkpoint` lays the shards out, one safetensors file a process with the shards' places in its
header, and puts them together again for as many processes as there are. (Its usual storage would pickle the places.)
Around it the same frame as in `checkpoint.py`: a hidden folder, everything fsynced, a manifest with checksums last, one
rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,  # pyright: ignore[reportPrivateImportUsage]
    HuggingFaceStorageReader,  # pyright: ignore[reportPrivateImportUsage]
    HuggingFaceStorageWriter,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.checkpoint import load as dcp_load  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.checkpoint import save as dcp_save  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from grpo_fast.errors import UserError
from grpo_fast.parallel.world import World
from grpo_fast.run.checkpoint import SHARDS_VERSION, Folder, read_state, save_failure

Named = dict[str, Tensor]
Place = Callable[[str, torch.Size, torch.dtype], Tensor]
"""Where a tensor of this name, size and dtype is read into: empty, whole or shared out"""


def save_shards(
    run_dir: Path,
    step: int,
    named: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int,
    world: World,
) -> Path:
    """`checkpoint.save` by all processes of `world` together, each its own shards (`DTensor`) on the host.

    What is no `DTensor` is the same on every process and written once. Runs in any thread: it speaks to the other
    processes by the group that is kept for saving.
    """
    folder = Folder(run_dir, step)
    state_text = json.dumps(state, indent=1)
    needed = sum(value.numel() * value.element_size() for value in named.values())
    try:
        world.first(lambda: _failing_well(folder.begin, folder, needed), saving=True)
        try:
            with _quiet():
                dcp_save(
                    dict(named),
                    storage_writer=HuggingFaceStorageWriter(str(folder.aside), save_distributed=True),
                    process_group=world.saving,
                )
        except CheckpointException as error:
            raise UserError(_reason(error, folder, needed)) from error
        listed = world.agreed(lambda: [path.name for path in folder.aside.glob("*.safetensors")], saving=True)
        names = sorted(
            {name for names in listed for name in names}
        )  # one's listing may lag behind others' files
        own = [folder.aside / name for name in names[world.rank :: world.size]]
        files = world.agreed(lambda: _failing_well(lambda: _on_disk(own), folder, needed), saving=True)
        entries = {name: entry for part in files for name, entry in part.items()}
        world.first(
            lambda: _failing_well(
                lambda: folder.seal(entries, {}, state_text, keep=keep, version=SHARDS_VERSION),
                folder,
                needed,
            ),
            saving=True,
        )
    finally:
        if world.is_first:
            shutil.rmtree(folder.aside, ignore_errors=True)
    return folder.target


def load_named(path: Path, place: Place, world: World) -> tuple[Named, dict[str, Any], dict[str, str]]:
    """(tensors, state, {alias: name}) of a checkpoint of either form, which has been checked.

    `place` says what each tensor is read into; all processes call it with the same names in the same order.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    aliases = {alias: name for named in manifest["aliases"].values() for alias, name in named.items()}
    with _quiet():
        found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        named: Named = {}
        for name in sorted(found):
            entry = found[name]
            assert isinstance(entry, TensorStorageMetadata)
            named[name] = place(name, entry.size, entry.properties.dtype)
        try:
            dcp_load(
                named,
                storage_reader=HuggingFaceStorageReader(str(path)),
                process_group=world.saving,
                no_dist=world.size == 1,
            )
        except CheckpointException as error:
            raise UserError(f"checkpoint {path}: cannot be read ({_cause(error)})") from error
    return named, read_state(path), aliases


def _on_disk(own: list[Path]) -> dict[str, dict[str, Any]]:
    """This process's shards, fsynced, with their sizes and checksums."""
    entries = {}
    for path in own:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.name] = {"size": path.stat().st_size, "sha256": digest}
    return entries


def _failing_well(work: Callable[[], Any], folder: Folder, needed: int) -> Any:
    try:
        return work()
    except OSError as error:
        raise UserError(save_failure(error, folder.target, needed)) from error


def _reason(error: CheckpointException, folder: Folder, needed: int) -> str:
    cause = _cause(error)
    if isinstance(cause, OSError):
        return save_failure(cause, folder.target, needed)
    return f"cannot save checkpoint {folder.target}: {' '.join(str(cause).split())}"


def _cause(error: CheckpointException) -> BaseException:
    """The first process's own error."""
    return next((failure[0] for failure in error.failures.values()), error)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a storage that is called experimental, and of running alone
        yield
