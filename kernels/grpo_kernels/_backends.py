"""The door to the backends of the loss head."""

import torch

from ._head import Coefficients, Head, HeadOutput, Needs, choose_backend, on_device
from ._torch_head import torch_head


def run_head(head: Head, needs: Needs, coefficients: Coefficients | None, backend: str) -> HeadOutput:
    """One pass over token chunks on the chosen backend; gradients need coefficients."""
    chosen = choose_backend(backend, head.hidden.device, head.hidden.dtype)
    device = head.hidden.device
    # Autocast would send the float32 products through a lower precision.
    with on_device(device), torch.autocast(device.type, enabled=False):
        if chosen == "triton":
            from ._triton_head import triton_head  # imports triton, which only this backend needs

            return triton_head(head, needs, coefficients)
        if chosen == "fused":
            from ._fused_head import fused_head

            return fused_head(head, needs, coefficients)
        return torch_head(head, needs, coefficients)
