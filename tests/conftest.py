"""Set up before any test module: Triton's interpreter where there is no GPU, and poisoned memory."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest):
    """In the kernels' tests torch.empty holds NaN, so an output that nobody wrote fails."""
    if not request.module.__name__.rpartition(".")[2].startswith("test_kernels"):
        yield
        return
    # not use_deterministic_algorithms: that imports torch's compiler, seconds for each test process
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode(before)
