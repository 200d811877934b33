"""vLLM servers of a run of several processes: some processes have a server each, all take part in the hand-over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.guard import Guard
from grpo_fast.parallel.world import World


class Relay:
    """A `RolloutEngine` of one process among several.

    `push` gathers the weights on all of them, tensor after tensor; the processes with a server of their own keep a copy
    on the host and hand it over from there, again if need be. The others generate nothing: they are given no prompts.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._device = world, device
        self._guard: Guard | None = None
        self._held: list[tuple[str, Tensor]] = []

    def serve(self, guard: Guard) -> None:
        """This process has a server: `guard` around it, whose `weights` are `held`."""
        self._guard = guard

    def held(self) -> Iterable[tuple[str, Tensor]]:
        """The weights of the last `push`, on the policy's device one after another."""
        return ((name, value.to(self._device)) for name, value in self._held)

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        places: Sequence[int] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """The server's; without prompts nothing."""
        if self._guard is None or not prompts:
            assert not prompts, "a process without a server was given prompts"
            return []
        return self._guard.generate(prompts, n, sampling, seed, places=places, on_group=on_group)

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Gather and hand over; UserError on every process where one server refuses."""
        self._held = []
        for name, value in named_parameters:
            if self._guard is not None:
                self._held.append((name, value.to("cpu", copy=True)))
        guard = self._guard
        self._world.agreed(lambda: guard.push(self.held(), version) if guard is not None else None)

    def counts(self) -> dict[str, float]:
        """The retries of all servers, as a metric."""
        own = self._guard.counts() if self._guard is not None else {}
        parts = self._world.agreed(lambda: own)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in parts[0]}

    def sleep(self) -> None:
        """Give memory back until `wake`."""
        if self._guard is not None:
            self._guard.sleep()

    def wake(self) -> None:
        """Be ready to generate again."""
        if self._guard is not None:
            self._guard.wake()

    def close(self) -> None:
        """Release everything."""
        if self._guard is not None:
            self._guard.close()
