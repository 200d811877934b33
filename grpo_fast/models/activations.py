"""What a forward pass saves for its backward pass, kept on the host in between.

With gradient checkpointing that is the input of each layer, without it everything a layer saves. Weights stay where
they are, and what several operations save crosses once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 1 << 20  # smaller ones are not worth a copy
_AHEAD = 2  # how many are on their way, out or back, beside the one that is used


@contextmanager
def activations_on_host(weights: Iterable[Tensor], *, min_bytes: int = MIN_BYTES) -> Iterator[None]:
    """Around a forward pass; its backward pass may run after the context has ended.

    `weights` are left alone, and so is every tensor of less than `min_bytes`. On a CUDA device the copies run on a
    stream of their own, from and to page-locked memory, and the backward pass finds the next tensors already on
    their way. Elsewhere they are copied within the host, which saves nothing and computes the same.
    """
    mover = _Mover({weight.untyped_storage().data_ptr() for weight in weights}, min_bytes)
    with torch.autograd.graph.saved_tensors_hooks(mover.pack, mover.unpack):
        yield
    mover.settle()


@dataclass(eq=False)
class _Stretch:
    """A saved stretch of memory on the host."""

    number: int
    host: Tensor  # (n,)
    device: torch.device
    users: int = 0
    """Operations that saved it and have not had it back"""
    fetched: Tensor | None = None
    arrived: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Handle:
    """What autograd keeps instead of a tensor."""

    stretch: _Stretch
    shape: torch.Size
    stride: tuple[int, ...]


class _Mover:
    """The stretches of one forward pass.

    No tensor is handed to the allocator while the other stream may still use it: the stream that computes is made to
    wait first. So memory is free again as soon as the copy is through, however far the host has run ahead.
    """

    def __init__(self, weights: set[int], min_bytes: int) -> None:
        self._weights, self._min_bytes = weights, min_bytes
        self._stretches: list[_Stretch] = []
        self._known: dict[tuple[object, ...], tuple[StorageWeakRef, _Stretch]] = {}
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Handle:
        storage = tensor.untyped_storage()
        if (
            tensor.nbytes < self._min_bytes
            or storage.nbytes() < tensor.nbytes  # an expanded one
            or storage.data_ptr() in self._weights
        ):
            return tensor
        dense = _is_dense(tensor)
        stride = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
        owner = StorageWeakRef(storage)  # while it is kept, no other storage gets its number
        where = () if dense else (tensor.shape, tensor.stride())
        key = (owner.cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version, *where)
        found = self._known.get(key)
        if found is not None:
            stretch = found[1]
        else:
            flat = tensor.detach()
            flat = flat.as_strided((flat.numel(),), (1,)) if dense else flat.reshape(-1)
            stretch = self._store(flat)
            self._known[key] = (owner, stretch)
        stretch.users += 1
        return _Handle(stretch, tensor.shape, stride)

    def unpack(self, saved: Tensor | _Handle) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        stretch = saved.stretch
        for number in range(stretch.number, max(-1, stretch.number - 1 - _AHEAD), -1):
            if number == stretch.number or self._stretches[number].users > 0:
                self._fetch(self._stretches[number])
        if stretch.arrived is not None:
            torch.cuda.current_stream(stretch.device).wait_event(stretch.arrived)
        assert stretch.fetched is not None
        tensor = stretch.fetched.as_strided(saved.shape, saved.stride)
        stretch.users -= 1
        if stretch.users <= 0:
            stretch.fetched = stretch.arrived = None
        return tensor

    def settle(self) -> None:
        """Let go of what has been copied out."""
        while self._leaving:
            self._let_go()

    def _store(self, flat: Tensor) -> _Stretch:
        if flat.is_cuda:
            if self._stream is None:
                self._stream = torch.cuda.Stream(flat.device)
            while len(self._leaving) > _AHEAD:
                self._let_go()
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(flat.device))
            with torch.cuda.stream(self._stream):
                host.copy_(flat, non_blocking=True)
                left = torch.cuda.Event()
                left.record()
            self._leaving.append((left, flat))
        else:
            host = flat.to("cpu", copy=True)
        stretch = _Stretch(len(self._stretches), host, flat.device)
        self._stretches.append(stretch)
        return stretch

    def _let_go(self) -> None:
        left, flat = self._leaving.popleft()
        torch.cuda.current_stream(flat.device).wait_event(left)

    def _fetch(self, stretch: _Stretch) -> None:
        if stretch.fetched is not None:
            return
        if self._stream is None:
            stretch.fetched = stretch.host.to(stretch.device, copy=True)
            return
        stretch.fetched = torch.empty(stretch.host.shape, dtype=stretch.host.dtype, device=stretch.device)
        self._stream.wait_stream(torch.cuda.current_stream(stretch.device))
        with torch.cuda.stream(self._stream):
            stretch.fetched.copy_(stretch.host, non_blocking=True)
            stretch.arrived = torch.cuda.Event()
            stretch.arrived.record()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its stretch of memory without a gap, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
