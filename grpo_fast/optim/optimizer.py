"""One optimizer step: float32 master weights, clipping, the learning-rate schedule, non-finite steps skipped."""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grpo_fast.errors import UserError
from grpo_fast.optim import lowbit
from grpo_fast.optim.host import GradientPort, HostRoom, publish

Schedule = Literal["constant", "cosine", "linear"]
Kind = Literal["adamw", "adamw8bit", "adafactor"]
Where = Literal["device", "while_training", "host"]


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
    """AdamW, AdamW with 8-bit states, or Adafactor, on float32 master weights.

    float32 parameters are their own masters. A parameter of a narrower dtype gets a float32 copy, and its
    gradients are added up in float32 as each backward pass delivers them (the narrow gradient is freed at once),
    so that a gradient does not depend on the number of micro-batches by more than one rounding each.
    `max_grad_norm` 0 clips nothing.

    `where` says where masters and states live. `while_training`: on the parameters' device between `reload` and
    `offload`, else on the host. `host`: always there, the update runs there, and every parameter has a master; a
    step then moves each gradient out once a micro-batch and each weight in once, in the parameter's dtype (bfloat16:
    2 · parameters · (micro-batches + 1) bytes), and the device holds neither masters nor states nor summed gradients.

    Parameters that are shared out over processes (`DTensor`, float32) have their states where they are; every process
    calls `step`. UserError for a kind or place of states that such parameters cannot have.
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
        kind: Kind = "adamw",
        where: Where = "device",
    ):
        self.parameters = [p for p in parameters if p.requires_grad]
        if any(isinstance(p, DTensor) for p in self.parameters):
            _check_shared_out(kind, where)
        self._where: Where = where
        self._port, self._room = GradientPort(), HostRoom()
        self.masters = [self._master(p) for p in self.parameters]
        self.max_grad_norm = max_grad_norm or math.inf
        self.skipped_steps = 0
        self.nonfinite: list[int] = []
        """Of the step that was skipped last: non-finite numbers in each parameter's gradient (this process's part)"""
        self._lowbit = kind == "adamw8bit"
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
        elif kind == "adamw8bit":
            self.inner = lowbit.adamw8bit(groups, lr=lr, betas=betas, eps=eps)
        else:
            self.inner = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def _master(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        on_host = self._where == "host"
        if parameter.dtype == torch.float32 and not on_host:
            return parameter
        device = torch.device("cpu") if on_host else parameter.device
        master = torch.nn.Parameter(parameter.detach().to(device, torch.float32, copy=True))

        def collect(p: Tensor) -> None:
            if p.grad is None:
                return
            if on_host:
                self._port.send(p.grad, master)
            else:
                gradient = p.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master

    @property
    def ordered(self) -> list[Tensor]:
        """The masters in the order of the inner optimizer's states."""
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient added up since the last step, 0-d; nothing is clipped."""
        self._port.finish()
        return torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])

    def count_nonfinite(self) -> list[int]:
        """Non-finite numbers in each parameter's gradient; of a shared-out one, in this process's part."""
        grads = [master.grad for master in self.masters]
        parts = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        return [0 if part is None else int((~part.isfinite()).sum()) for part in parts]

    def step(self, lr: float, *, loss: Tensor | float = 0.0) -> tuple[float, bool]:
        """Clip the gradient to `max_grad_norm`, update at `lr` and clear it.

        Returns the gradient's norm before clipping, and whether the step was taken: a non-finite gradient or `loss`
        changes nothing, is counted in `skipped_steps` and looked at in `nonfinite`.
        """
        self.reload()
        total = self.gradient_norm()
        norm = whole_number(total)
        taken = math.isfinite(norm) and math.isfinite(float(loss))
        if taken:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, total)
            for group in self.inner.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            with lowbit.stepping(self.masters[0]) if self._lowbit else nullcontext():
                self.inner.step()
            self._publish()
        else:
            self.skipped_steps += 1
            self.nonfinite = self.count_nonfinite()
        self.inner.zero_grad(set_to_none=True)
        return norm, taken

    def discard(self) -> None:
        """Forget the gradients added up since the last step."""
        self._port.finish()
        for parameter in self.parameters:
            parameter.grad = None
        self.inner.zero_grad(set_to_none=True)

    def offload(self) -> None:
        """Leave the device to others until `reload`, with `where="while_training"`; gradients stay."""
        if self._where == "while_training":
            self._room.park(self._movable())

    def reload(self) -> None:
        """Undo `offload`; without one before it, nothing happens."""
        self._room.bring_back()

    def _movable(self) -> Iterator[Tensor]:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                yield master
        for state in self.inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim:  # step counters stay
                    yield from lowbit.parts(value)

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                publish(master, parameter)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state; float32 masters of narrower parameters under `masters`.

        Plain tensors only. While it is offloaded they are those on the host: the device is not touched.
        """
        pairs = zip(self.parameters, self.masters, strict=True)
        masters = {str(i): self._room.contents(m).detach() for i, (p, m) in enumerate(pairs) if p is not m}
        inner = lowbit.plain_states(self.inner.state_dict())
        for values in inner["state"].values():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = self._room.contents(value)
        return {"inner": inner, "masters": masters, "skipped_steps": self.skipped_steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`; parameters are set from their masters.

        A state saved with another `where` fits: a master it does not have is the parameter as it is.
        """
        self.reload()
        self.inner.load_state_dict(
            lowbit.quantised_states(state["inner"]) if self._lowbit else state["inner"]
        )
        self.skipped_steps = int(state["skipped_steps"])
        for index, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            if master is not parameter:
                master.copy_(state["masters"].get(str(index), parameter))
        self._publish()


def whole_number(value: Tensor) -> float:
    """A 0-d tensor as a number, added up over the processes where each has a part of it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()


def _check_shared_out(kind: Kind, where: Where) -> None:
    if kind == "adafactor":
        raise UserError(
            "optim.optimizer adafactor: PyTorch's cannot work on weights that are shared out over processes; take "
            "adamw8bit, whose states are shared out too"
        )
    if where != "device":
        raise UserError(
            f"memory.optimizer {where}: on several processes each holds its share of the states on its device already; "
            "leave it at device"
        )
