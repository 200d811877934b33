"""Set-up of every test: Triton's interpreter where there is no GPU, and poisoned memory for the kernels."""

import inspect
import os
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and nobody waits for a hub
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest

from grpo_fast.run.allocator import keep_freed_memory

keep_freed_memory()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
fill: Any = torch.utils.deterministic  # type: ignore[attr-defined]


def quicken_interpreter() -> None:
    """Triton's interpreter looks through its language modules at every call; what it finds there is remembered."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    library: Any = interpreter
    names: dict[Any, list[str]] = {}

    def patch_builtin(place: Any, builder: Any, scope: Any) -> None:
        is_builtin = library.tl.core.is_builtin
        if place not in names:
            names[place] = [name for name, member in inspect.getmembers(place) if is_builtin(member)]
        for name in names[place]:
            if is_builtin(member := getattr(place, name)):
                library._patch_attr(place, name, member, builder, scope)

    if all(hasattr(library, name) for name in ("_patch_builtin", "_patch_attr")):
        library._patch_builtin = patch_builtin


quicken_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: the other process takes the many short ones meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest):
    """Around kernel tests: new memory holds NaN, so that an element never written is seen."""
    if not request.node.path.name.startswith("test_kernels"):
        yield
        return
    before = torch.get_deterministic_debug_mode(), fill.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    fill.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode(before[0])
    fill.fill_uninitialized_memory = before[1]
