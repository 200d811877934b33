"""Host memory: let the C library keep what tensors free, instead of giving it back to the kernel each time."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Make glibc serve large tensors from memory it already has; True where that could be set.

    By default every block above 32 MiB at most is mapped anew, and its pages are zeroed by the kernel at first
    touch: at a training step of hundreds of short-lived tensors that costs more than the arithmetic. Peak memory
    stays what it is; it is only not returned before the process ends. No effect off glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
