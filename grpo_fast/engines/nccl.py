"""NCCL between this process and others that are no part of its `torch.distributed` world: the C library, by ctypes.

The other side is vLLM's weight transfer: it joins with the same unique id and begins with the sum of one element, so
this side does too.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from grpo_fast.engines.faults import EngineError

ID_BYTES = 128
_UINT8, _FLOAT32, _SUM = 1, 7, 0  # of nccl.h


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


@cache
def _library() -> ctypes.CDLL:
    """The NCCL that torch brought; EngineError where there is none."""
    names = ["libnccl.so.2"]  # first: the one torch has loaded
    spec = find_spec("nvidia.nccl") if find_spec("nvidia") else None
    folders = (spec and spec.submodule_search_locations) or ()
    names += [str(Path(folder) / "lib" / "libnccl.so.2") for folder in folders]
    for name in names:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise EngineError("libnccl.so.2 is not found: engine.transfer = nccl needs PyTorch's CUDA build")
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: object) -> None:
    library = _library()
    code = getattr(library, name)(*arguments)
    if code:
        raise EngineError(f"{name} failed: {library.ncclGetErrorString(code).decode()}")


def new_unique_id() -> bytes:
    """The name of a new group (ID_BYTES,), for every rank of it."""
    unique_id = _UniqueId()
    _call("ncclGetUniqueId", ctypes.byref(unique_id))
    return bytes(unique_id)


class Communicator:
    """One rank of a group. Entering it waits for all the others."""

    def __init__(self, unique_id: bytes, *, rank: int, world_size: int, device: torch.device) -> None:
        self._device = device
        self._communicator = ctypes.c_void_p()
        with torch.cuda.device(device):
            _call(
                "ncclCommInitRank",
                ctypes.byref(self._communicator),
                ctypes.c_int(world_size),
                _UniqueId.from_buffer_copy(unique_id),
                ctypes.c_int(rank),
            )
            one = torch.zeros(1, device=device)
            stream = torch.cuda.current_stream()
            _call(
                "ncclAllReduce",
                *_ends(one),
                _FLOAT32,
                _SUM,
                self._communicator,
                ctypes.c_void_p(stream.cuda_stream),
            )
            stream.synchronize()

    def broadcast(self, buffer: Tensor) -> None:
        """Send `buffer` (bytes,) uint8 from rank 0 to all others, and wait until it has left."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            _call(
                "ncclBroadcast",
                *_ends(buffer),
                _UINT8,
                0,
                self._communicator,
                ctypes.c_void_p(stream.cuda_stream),
            )
            stream.synchronize()

    def abort(self) -> None:
        """Leave the group, and stop what hangs in it."""
        if self._communicator:
            _library().ncclCommAbort(self._communicator)
        self._communicator = ctypes.c_void_p()


def _ends(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]:
    """Where a collective reads, where it writes, and how many elements."""
    pointer = tensor.data_ptr()
    return ctypes.c_void_p(pointer), ctypes.c_void_p(pointer), ctypes.c_size_t(tensor.numel())
