"""The hand-over of weights to a vLLM server, in chunks of bounded size.

Inside one GPU a chunk lies in a buffer that both processes map (CUDA IPC); between GPUs it is broadcast over NCCL.
Both send what vLLM calls the packed form: the tensors' bytes one after another, with their names, types, shapes and
sizes beside them. Which form a server reads is set when it starts (`--weight-transfer-config`).
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.faults import EngineError
from grpo_fast.engines.nccl import Communicator, new_unique_id
from grpo_fast.errors import UserError

CHUNK_BYTES = 256 << 20
"""A chunk holds at most this much, or a single larger tensor."""

Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Parcel:
    """What one `/update_weights` request carries, and what must happen while the server is at it."""

    info: dict[str, Any]
    meanwhile: Callable[[], None] | None = None


class Transfer(Protocol):
    """One way to hand weights over. `name` is what vLLM calls it."""

    name: str

    def greeting(self, world_size: int) -> Parcel:
        """What `/init_weight_transfer_engine` carries, for a server of `world_size` workers."""
        ...

    def parcel(self, chunk: list[Named]) -> Parcel:
        """One chunk on its way; it is sent before the next one is asked for."""
        ...

    def finish(self) -> None:
        """All chunks have arrived, or none will: free what they needed."""
        ...

    def close(self) -> None:
        """Nothing is sent any more."""
        ...


def chunks(named: Iterable[Named], limit: int) -> Iterator[list[Named]]:
    """Runs of tensors of one type, of at most `limit` bytes together; a larger tensor is alone.

    Of one type, because the receiver views the bytes in place, where they must be aligned.
    """
    run: list[Named] = []
    size = 0
    for name, tensor in named:
        if run and (size + tensor.nbytes > limit or run[0][1].dtype != tensor.dtype):
            yield run
            run, size = [], 0
        run.append((name, tensor))
        size += tensor.nbytes
    if run:
        yield run


def description(chunk: list[Named]) -> dict[str, Any]:
    """Names, types and shapes, as vLLM reads them."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
        "shapes": [list(tensor.shape) for _, tensor in chunk],
    }


def pack_into(buffer: Tensor, chunk: list[Named]) -> list[int]:
    """Write the tensors' bytes into `buffer` (bytes,) uint8 one after another; their sizes."""
    start = 0
    sizes = []
    for _, tensor in chunk:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        buffer[start : start + flat.numel()].copy_(flat)
        sizes.append(flat.numel())
        start += flat.numel()
    return sizes


class CudaIpc:
    """Through memory of the GPU that trainer and server share."""

    name = "ipc"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None
        self._handle: tuple | None = None

    def greeting(self, world_size: int) -> Parcel:
        """Refuses a server of several workers, whose other GPUs the policy is not on."""
        if world_size != 1:
            raise UserError(
                f"engine: the server has {world_size} workers, and engine.transfer = ipc reaches one that shares the "
                "policy's GPU; use nccl, or a server on one GPU"
            )
        return Parcel({"packed": True})

    def parcel(self, chunk: list[Named]) -> Parcel:
        """Copy the chunk into the shared buffer; the server reads it from there."""
        from torch.multiprocessing.reductions import reduce_tensor

        needed = sum(tensor.nbytes for _, tensor in chunk)
        if self._buffer is None or self._buffer.numel() < needed:
            # A fresh export each: the server releases the one before when it sees another.
            self._buffer = torch.empty(max(needed, CHUNK_BYTES), dtype=torch.uint8, device=self._device)
            self._handle = reduce_tensor(self._buffer)[1]
        sizes = pack_into(self._buffer, chunk)
        torch.cuda.current_stream(self._device).synchronize()
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        pickled = base64.b64encode(pickle.dumps({uuid: self._handle})).decode()
        return Parcel(description(chunk) | {"tensor_sizes": sizes, "ipc_handles_pickled": pickled})

    def finish(self) -> None:
        """Give the buffer back once the server has let go of it."""
        self._buffer = self._handle = None
        torch.cuda.ipc_collect()

    def close(self) -> None:
        """Nothing is held between hand-overs."""
        self._buffer = self._handle = None


class Nccl:
    """By broadcast to the server's own GPUs, on this machine or another."""

    name = "nccl"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: Communicator | None = None

    def greeting(self, world_size: int) -> Parcel:
        """The trainer is rank 0 of a new group; both sides enter it at the same time."""
        self.close()
        unique_id = new_unique_id()

        def enter() -> None:
            self._group = Communicator(unique_id, rank=0, world_size=world_size + 1, device=self._device)

        info = {
            "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
            "rank_offset": 1,
            "world_size": world_size + 1,
            "packed": True,
            "packed_buffer_size_bytes": CHUNK_BYTES,
        }
        return Parcel(info, enter)

    def parcel(self, chunk: list[Named]) -> Parcel:
        """One broadcast: the server cuts where the bytes pass CHUNK_BYTES, which within a chunk is at its end."""
        group = self._group
        if group is None:
            raise EngineError("the NCCL group with the server is gone")
        buffer = torch.empty(
            sum(tensor.nbytes for _, tensor in chunk), dtype=torch.uint8, device=self._device
        )
        pack_into(buffer, chunk)
        return Parcel(description(chunk), lambda: group.broadcast(buffer))

    def finish(self) -> None:
        """Nothing is held between hand-overs but the group."""

    def close(self) -> None:
        """Leave the group, whatever state it is in."""
        if self._group is not None:
            self._group.abort()
        self._group = None


def transfer_of(settings: EngineSettings, device: torch.device) -> Transfer:
    """How weights on `device` reach the server; UserError where there is no way."""
    check_device(device)
    if settings.transfer == "nccl" or (settings.transfer == "auto" and _is_elsewhere(settings)):
        return Nccl(device)
    return CudaIpc(device)


def check_device(device: torch.device) -> None:
    """UserError for a device whose weights no vLLM server can take."""
    if device.type != "cuda":
        raise UserError(
            f"engine.kind = vllm: weights cannot be handed over to a vLLM server without a CUDA device, and the run is "
            f"on {device.type}; use engine.kind = local"
        )


def _is_elsewhere(settings: EngineSettings) -> bool:
    return bool(settings.devices) or (bool(settings.url) and settings.allow_remote)
