"""`torch.compile` for packed passes: each kind of decoder layer once, whatever the packed length.

Attention stays outside: its plan differs from batch to batch, and so would every graph that sees it. So each layer is
broken at its attention and compiled as four pieces (norm; projections and rotary embedding; output projection; the
rest) whose only variable is the packed length, a symbol. Generation on the same weights runs the plain layers.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import callback
from torch._dynamo.backends.registry import lookup_backend
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_fast.attention.function import ATTENTION_NAME, attention
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.errors import UserError
from grpo_fast.models.pretrained import one_line
from grpo_fast.models.self_check import HIDDEN_LIMIT, packed_hidden_states
from grpo_fast.packing import pack

GRAPH_LIMIT = 64
"""Graphs after which compilation is given up. A layer has 4 to 6, once for each of: training, scoring without
gradients, the adapter switched off, the frozen reference."""


class SealedPlan:
    """A plan on its way through compiled code, which would otherwise compile anew for each plan's numbers."""

    __slots__ = ("plan",)

    def __init__(self, plan: PackedPlan):
        self.plan = plan


class CompiledLayers:
    """The compiled decoder layers of one policy (and of its frozen copy), and what compiling them has cost."""

    def __init__(self, backend: str = "inductor", *, limit: int = GRAPH_LIMIT):
        _clock.listen()
        self.graphs = 0
        self.limit = limit
        self.off = ""
        """Why compilation was given up; empty while it is on."""
        self._seconds_before = _clock.seconds
        self._backend = backend
        self._layers: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._news: list[str] = []
        self._told = 0

    @property
    def seconds(self) -> float:
        """Wall time of all compilation in this process since this object was made."""
        return _clock.seconds - self._seconds_before

    def install(self, model: PreTrainedModel) -> None:
        """Let the decoder layers of `model` run compiled wherever they meet a sealed plan.

        Raises UserError for a model whose layers are not transformers' own. A deep copy of the model is plain again.
        """
        body = model.base_model
        layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise UserError(
                f"policy.compile: {type(model).__name__} has no decoder layers that can be compiled"
            )
        AttentionInterface.register(ATTENTION_NAME, _outside)
        # Dynamo's own limit, for each piece of code, would end compilation without a word before ours does.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, self.limit)
        for layer in layers:
            # nn.Module's slot for a compiled call: never copied or saved with the module
            layer._compiled_call_impl = partial(self._call, layer)

    def seal(self, plan: PackedPlan) -> PackedPlan | SealedPlan:
        """The plan as the model is to be given it: sealed while compilation is on."""
        if not self.off and self.graphs > self.limit:
            self.off = f"{self.graphs} graphs in {self.seconds:.0f} s, more than {self.limit}"
            self._news.append(f"warning: torch.compile is switched off from here on: {self.off}")
        return plan if self.off else SealedPlan(plan)

    def news(self) -> list[str]:
        """Lines for the user since the last call: what has been compiled, and whether it was given up."""
        if self.graphs != self._told:
            self._news.append(
                f"torch.compile: {self.graphs} graphs of the policy's layers, {self.seconds:.0f} s so far"
            )
            self._told = self.graphs
        news, self._news = self._news, []
        return news

    def metrics(self) -> dict[str, float]:
        """`compile/graphs` and `time/compile_s` so far."""
        return {"compile/graphs": float(self.graphs), "time/compile_s": self.seconds}

    def _call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("plan"), SealedPlan):
            return layer._call_impl(*args, **kwargs)
        forward = self._compiled(type(layer))
        # transformers checkpoints in __call__ (then that is done by now) or, from 5.20 on, in forward.
        own_call = type(layer).__call__ is not nn.Module.__call__
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled() and not own_call:
            return layer._gradient_checkpointing_func(partial(forward, layer, **kwargs), *args)  # type: ignore[operator]
        return forward(layer, *args, **kwargs)

    def _compiled(self, kind: type[nn.Module]) -> Callable[..., Any]:
        forward = inspect.unwrap(kind.forward)  # without the checkpointing around it
        if forward not in self._layers:
            self._layers[forward] = torch.compile(forward, dynamic=True, backend=self._count)
        return self._layers[forward]

    def _count(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return lookup_backend(self._backend)(graph, inputs)


@torch.compiler.disable
def _outside(module: nn.Module, *args: Any, plan: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention of `attention.function` as the compiler is to see it: not at all."""
    return attention(module, *args, plan=plan.plan if isinstance(plan, SealedPlan) else plan, **kwargs)


def check_compiled(model: PreTrainedModel, compiled: CompiledLayers) -> None:
    """Compile on a small packed batch; its hidden states and gradients must be those of the plain layers.

    Gradients are compared on parameters of up to a million elements (norms, biases, adapters), which the whole
    backward pass lies behind. UserError where compiling fails or the numbers differ.
    """
    prompts, completions = [list(range(1, 12)), list(range(20, 27))], [[5] * 9, [6] * 14, [7] * 4, [8] * 17]
    # 59 positions, which is the size of nothing else in a model: equal sizes would become one symbol
    (batch,) = pack(prompts, completions, prompt_of=[0, 0, 1, 1], token_budget=4096)
    batch = batch.to(model.device)
    weights = [p for p in model.base_model.parameters() if p.requires_grad and p.numel() <= 1 << 20]

    def run(layers: CompiledLayers | None) -> list[Tensor]:
        hidden = packed_hidden_states(model, batch, layers)
        # a direction's share, since the last norm fixes the sum of squares: its gradient would be all rounding
        loss = (hidden.float() @ torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)).mean()
        grads = torch.autograd.grad(loss, weights, allow_unused=True) if weights else ()
        return [x.float() for x in (hidden.detach(), *grads) if x is not None]

    try:
        found = run(compiled)
    except Exception as error:  # tracing, code generation and the compilers each have errors of their own
        raise UserError(
            f"policy.compile: torch.compile fails on {type(model).__name__}: {one_line(error)}"
        ) from error
    scale = max(float(x.norm()) for x in found[1:]) if weights else 0.0
    for place, (mine, plain) in enumerate(zip(found, run(None), strict=True)):
        # a parameter whose gradient is all but zero is measured against the largest
        error = float((mine - plain).norm() / torch.clamp(plain.norm(), min=1e-3 * scale if place else 0.0))
        if not error <= HIDDEN_LIMIT[model.dtype]:
            raise UserError(
                f"policy.compile: compiled layers of {type(model).__name__} differ from plain ones by {error:.1%} "
                f"in a {'gradient' if place else 'hidden state'}; leave it off"
            )


class _Clock:
    """Seconds this process has spent compiling, those of backward passes included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def listen(self) -> None:
        """Be called by the compiler from now on; `torch.compiler.reset` forgets who listens."""
        if self._start not in callback.callback_handler.start_callbacks:
            callback.on_compile_start(self._start)
            callback.on_compile_end(self._end)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started


_clock = _Clock()
