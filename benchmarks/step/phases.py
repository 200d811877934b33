"""Where the time of a step goes: a clock that is always in exactly one phase.

Marks lie at the borders of the real parts: hooks on the model's body, the attention function, the optimizer, and, for
the backward pass, identities in the autograd graph. The time between two marks belongs to the phase that the first one
began, so the phases add up to the whole and nothing can be lost. On a GPU the marks are CUDA events.

What is what: `body` everything of the transformer but attention (the products before and after it are body);
`head` from hidden states to the loss and back; `decode`, `prefill` the engine's passes; `sampling` all that the
engine does between its passes; `other` advantages, packing, metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.step import timing
from grpo_fast.attention.function import ATTENTION_NAME, attention
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer

PHASES = ("prefill", "decode", "sampling", "scoring", "body", "attention", "head", "optimizer", "other")


class Clock:
    """Marks in time order; `generating` tells the engine's passes from the trainer's."""

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.generating = False
        self._marks: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        """From here on the time belongs to `phase`."""
        if not self.on_gpu:
            self._marks.append((phase, timing.clock()))
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """In the place of `Run.phase_timer`: what `collect` calls generate and reward."""
        self.generating = name == "generate"
        self.enter("sampling" if self.generating else "scoring")
        try:
            yield
        finally:
            self.generating = False
            self.enter("other")

    def seconds(self) -> dict[str, float]:
        """Seconds by phase of everything from the first mark to the last; forgets the marks."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in pairwise(self._marks):
            found[phase] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        self._marks = []
        return found


class _Mark(torch.autograd.Function):
    """The identity; its backward pass enters a phase."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, phase: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.phase = clock, phase
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.clock.enter(ctx.phase)
        return (None, None, *gradients)


@contextmanager
def watched(policy: Policy, optimizer: Optimizer) -> Iterator[Clock]:
    """A clock that this policy's and this optimizer's work drives, for as long as the context lasts."""
    clock = Clock(policy.device)

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not clock.generating:
            clock.enter("body")
        else:
            clock.enter("prefill" if kwargs["input_ids"].shape[1] > 1 else "decode")

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if clock.generating:
            clock.enter("sampling")
            return output
        (output.last_hidden_state,) = _Mark.apply(clock, "body", output.last_hidden_state)  # pyright: ignore
        clock.enter("head")
        return output

    def timed_attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if clock.generating:
            return attention(module, query, key, value, *args, **kwargs)
        clock.enter("attention")
        query, key, value = _Mark.apply(clock, "body", query, key, value)  # pyright: ignore
        out, weights = attention(module, query, key, value, *args, **kwargs)
        (out,) = _Mark.apply(clock, "attention", out)  # pyright: ignore
        clock.enter("body")
        return out, weights

    def timed_step(lr: float, **told: Any) -> tuple[float, bool]:
        clock.enter("optimizer")
        result = Optimizer.step(optimizer, lr, **told)
        clock.enter("other")
        return result

    base: Any = policy.model.base_model
    hooks = [
        base.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, with_kwargs=True),
    ]
    replay = torch.cuda.CUDAGraph.replay

    def timed_replay(graph: torch.cuda.CUDAGraph) -> None:
        """A captured decode step runs no hooks."""
        clock.enter("decode")
        replay(graph)
        clock.enter("sampling")

    AttentionInterface.register(ATTENTION_NAME, timed_attention)
    optimizer.step = timed_step
    torch.cuda.CUDAGraph.replay = timed_replay  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield clock
    finally:
        torch.cuda.CUDAGraph.replay = replay
        del optimizer.step
        AttentionInterface.register(ATTENTION_NAME, attention)
        for hook in hooks:
            hook.remove()
