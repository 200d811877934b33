"""FLOPs of work that really runs, by torch's own counter: what the closed form of `flops.py` is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
_COUNTED_AS = {
    _aten.addmm_: _aten.addmm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Operations that torch's registry leaves out, and those whose formula is theirs."""


class _Opened(TorchDispatchMode):
    """Runs our operators as the Python they are made of, so that the counter below sees their matrix products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "grpo_kernels":
            return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts the matrix products of everything inside, backward passes and our own operators' among them.

    Let the work run once before: the first use of an attention back end tries it out.
    """
    counter = FlopCounterMode(display=False)
    counter.flop_registry |= {name: counter.flop_registry[known] for name, known in _COUNTED_AS.items()}
    with counter, _Opened():
        yield counter


def counted(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that `run` computes, as `counting` has them."""
    with counting() as counter:
        run()
    return counter.get_total_flops()
