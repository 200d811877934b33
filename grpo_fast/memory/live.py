"""Bytes of tensors alive, watched while a model runs on the meta device, where tensors have shapes and no storage."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class Live(TorchDispatchMode):
    """Counts the storages on the meta device that operations make inside the context, until they are freed.

    What one operation allocates and frees within itself is not seen. Tensors made before the context do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive"""
        self.peak = 0
        """Most bytes alive since the start"""
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._add(leaf, made_here=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._add(leaf, made_here=True)
        return out

    def _add(self, leaf: Any, *, made_here: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.device != META:
            return
        storage = leaf.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if made_here else 0
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
