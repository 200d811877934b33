"""Generation that goes on with fewer completions at a time where the device's memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.plain import PlainEngine
from grpo_fast.errors import UserError


class FewerRows:
    """A `RolloutEngine`: one in this process, whose `max_rows` is halved whenever it runs out of memory.

    The rollout is drawn again with the same seed, so its completions are the same up to rounding. Groups that were
    reported before memory ran out stand as they were reported. `tell` is given one line when that happened.
    """

    def __init__(self, engine: LocalEngine | PlainEngine, *, tell: Callable[[str], None]) -> None:
        self.engine, self._tell = engine, tell

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
        """The engine's `generate`; UserError when not even one completion at a time fits."""
        before = self.engine.max_rows
        reported: dict[int, list[Completion]] = {}

        def once(prompt: int, group: list[Completion]) -> None:
            if prompt in reported:
                return
            reported[prompt] = group
            if on_group is not None:
                on_group(prompt, group)

        while True:
            try:
                completions = self.engine.generate(prompts, n, sampling, seed, places=places, on_group=once)
                break
            except torch.OutOfMemoryError:
                pass  # what the traceback holds must be gone before memory is asked for again
            self._halve(len(prompts) * n)
        if self.engine.max_rows < before:
            self._tell(
                f"warning: out of memory while generating; from now on {self.engine.max_rows} completions at the same "
                f"time (set --rollout.max-rows {self.engine.max_rows})"
            )
        for prompt, group in reported.items():
            completions[prompt * n : (prompt + 1) * n] = group
        return completions

    def _halve(self, rows: int) -> None:
        rows = min(rows, self.engine.max_rows) // 2
        if rows < 1:
            raise UserError(
                "out of memory while generating one completion at a time: shorten completions "
                "(rollout.max_new_tokens) and prompts, or make room (memory.optimizer while_training, "
                "policy.quantize nf4)"
            )
        self.engine.sleep()
        self.engine.max_rows = rows
        self.engine.wake()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.push(named_parameters, version)

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def close(self) -> None:
        self.engine.close()
