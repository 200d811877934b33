"""One optimizer step: float32 master weights, clipping, the learning-rate schedule, non-finite steps skipped."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "cosine", "linear"]


def learning_rate(step: int, *, lr: float, warmup_steps: int, total_steps: int, schedule: Schedule) -> float:
    """Learning rate of update `step` (0-based): linear warm-up, then constant, or cosine/linear down to zero.

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return lr * (0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress)


class Optimizer:
    """AdamW or Adafactor on float32 master weights.

    float32 parameters are their own masters. A parameter of a narrower dtype gets a float32 copy, and its
    gradients are added up in float32 as each backward pass delivers them (the narrow gradient is freed at once),
    so that a gradient does not depend on the number of micro-batches by more than one rounding each.
    `max_grad_norm` 0 clips nothing.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float = 1.0,
        kind: Literal["adamw", "adafactor"] = "adamw",
    ):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else self._master(p) for p in self.parameters]
        self.max_grad_norm = max_grad_norm or math.inf
        self.skipped_steps = 0
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},  # norms and biases
        ]
        groups = [group for group in groups if group["params"]]
        if kind == "adafactor":
            # All tensors at once (foreach, the default on a GPU) would take 4 bytes a parameter more at the peak.
            self.inner: torch.optim.Optimizer = torch.optim.Adafactor(
                groups, lr=lr, weight_decay=weight_decay, foreach=False
            )
        else:
            self.inner = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    @staticmethod
    def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        master = torch.nn.Parameter(parameter.detach().float())

        def collect(p: Tensor) -> None:
            if p.grad is None:
                return
            gradient = p.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip the gradient to `max_grad_norm`, update at `lr` and clear it.

        Returns the gradient's norm before clipping, and whether the step was taken: a non-finite gradient changes
        nothing and is counted in `skipped_steps`.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm).item()
        taken = math.isfinite(norm)
        if taken:
            for group in self.inner.param_groups:
                group["lr"] = lr
            self.inner.step()
            self._publish()
        else:
            self.skipped_steps += 1
        self.inner.zero_grad(set_to_none=True)
        return norm, taken

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state; float32 masters of narrower parameters under `masters`."""
        pairs = zip(self.parameters, self.masters, strict=True)
        masters = {str(i): m.detach() for i, (p, m) in enumerate(pairs) if p is not m}
        return {"inner": self.inner.state_dict(), "masters": masters, "skipped_steps": self.skipped_steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`; parameters are set from their masters."""
        self.inner.load_state_dict(state["inner"])
        self.skipped_steps = int(state["skipped_steps"])
        for index, master in state["masters"].items():
            self.masters[int(index)].copy_(master)
        self._publish()
