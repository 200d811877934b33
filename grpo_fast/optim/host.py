"""Host memory beside a device's: tensors parked there, gradients brought out, weights brought in.

On a CUDA device copies run from and to page-locked memory, gradients on a stream of their own; on the CPU the same
code copies within the host, which is how it is tested.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; every dtype may start there
_IN_FLIGHT = 8  # gradients on their way out at the same time


class HostRoom:
    """Tensors of a device wait here: their contents on the host, their device memory given back.

    The tensors stay the objects they are, so whoever holds them (an optimizer) need not know. One block of host
    memory, exactly as large as what is parked, is kept from one time to the next.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._parked: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def park(self, tensors: Iterable[Tensor]) -> None:
        """Copy each tensor's contents here and free its memory; one that shares its memory stays where it is.

        While others are parked, nothing happens.
        """
        if self._parked:
            return
        movable = [tensor for tensor in tensors if _owns_memory(tensor)]
        starts = [0]
        for tensor in movable:
            starts.append(starts[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        if starts[-1] > len(self._block):
            self._block = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._block = _host_block(starts[-1], locked=any(tensor.is_cuda for tensor in movable))
        for tensor, start in zip(movable, starts, strict=False):
            place = self._block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor, non_blocking=True)
            self._parked[id(tensor)] = (tensor, place)
        for device in {tensor.device for tensor in movable if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        for tensor in movable:
            tensor.untyped_storage().resize_(0)

    @torch.no_grad()
    def bring_back(self) -> None:
        """Give every parked tensor its memory and its contents again."""
        for tensor, place in self._parked.values():
            tensor.untyped_storage().resize_(place.nbytes)
            tensor.copy_(place, non_blocking=True)
        self._parked.clear()

    def contents(self, tensor: Tensor) -> Tensor:
        """What the tensor holds: its copy here while it is parked, else itself."""
        return self._parked[id(tensor)][1] if id(tensor) in self._parked else tensor


def _owns_memory(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return (
        tensor.nbytes > 0
        and tensor.is_contiguous()
        and storage.nbytes() == tensor.nbytes
        and storage.resizable()
    )


def _host_block(size: int, *, locked: bool) -> Tensor:
    """`size` bytes on the host, page-locked where asked for.

    Registered with the driver rather than asked for with `pin_memory`, which rounds up to a power of two.
    """
    block = torch.empty(size, dtype=torch.uint8)
    if not locked:
        return block
    runtime: Any = torch.cuda.cudart()
    code = runtime.cudaHostRegister(block.data_ptr(), size, 0)
    if int(code) != 0:
        warnings.warn(
            f"cannot page-lock {size / 2**30:.1f} GiB of host memory ({code}): copies to and from it will be slow",
            stacklevel=2,
        )
        return block
    weakref.finalize(block, runtime.cudaHostUnregister, block.data_ptr()).atexit = False
    return block


class GradientPort:
    """Adds up gradients in float32 on the host while the device goes on with its backward pass.

    Each gradient crosses in its own dtype, once a micro-batch.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        # Events, copies, masters; and the gradients, whose memory must not be given away before they are copied.
        self._arriving: deque[tuple[torch.cuda.Event, Tensor, Tensor, Tensor]] = deque()

    def send(self, gradient: Tensor, master: Tensor) -> None:
        """Add `gradient` to `master.grad`; on a CUDA device the copy is only begun."""
        if not gradient.is_cuda:
            _add(master, gradient)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(gradient.device)
        staged = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with torch.cuda.stream(self._stream):
            staged.copy_(gradient, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._arriving.append((arrived, staged, master, gradient))
        while len(self._arriving) > _IN_FLIGHT:
            self._receive()

    def finish(self) -> None:
        """Wait for the gradients that are still on their way."""
        while self._arriving:
            self._receive()

    def _receive(self) -> None:
        arrived, staged, master, _ = self._arriving.popleft()
        arrived.synchronize()
        _add(master, staged)


@torch.no_grad()
def _add(master: Tensor, gradient: Tensor) -> None:
    if master.grad is None:
        master.grad = gradient.to(torch.float32, copy=True)
    else:
        master.grad.add_(gradient)  # float32 + narrower: added in float32


@torch.no_grad()
def publish(master: Tensor, parameter: Tensor) -> None:
    """Write a float32 master into its parameter, rounded to the parameter's dtype before it crosses to a device."""
    if not parameter.is_cuda or master.is_cuda:
        parameter.copy_(master)
        return
    staged = torch.empty(master.shape, dtype=parameter.dtype, pin_memory=True).copy_(master)
    parameter.copy_(staged, non_blocking=True)
