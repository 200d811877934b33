"""The token budget of micro-batches, made smaller where the device's memory does not take it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from grpo_fast.errors import UserError
from grpo_fast.packing import PackedBatch

Result = TypeVar("Result")


@dataclass
class TokenBudget:
    """What `optim.token_budget` has become in the course of a run."""

    tokens: int
    """At most so many in a micro-batch from now on."""
    retries: int = 0
    """Times it had to be made smaller."""
    tell: Callable[[str], None] | None = None
    """Is given one line whenever work was done with a smaller budget than it began with."""
    state: dict[str, float] = field(default_factory=dict)
    """What a checkpoint carries: `tokens`, where they have become fewer"""
    redo: bool = True
    """False where other processes are in the middle of the same step: then running out of memory is a UserError"""

    def __post_init__(self) -> None:
        self.tokens = min(self.tokens, int(self.state.get("tokens", self.tokens)))

    def run(
        self,
        batches_of: Callable[[int], list[PackedBatch]],
        work: Callable[[list[PackedBatch]], Result],
        *,
        undo: Callable[[], None] | None = None,
    ) -> Result:
        """`work` on the micro-batches of this budget; where memory runs out, all of it again on smaller ones.

        `undo` takes back what the failed attempt has left behind. Raises UserError when micro-batches cannot be made
        smaller: each sequence needs one as long as itself.
        """
        before = self.retries
        batches = batches_of(self.tokens)
        while True:
            try:
                result = work(batches)
                break
            except torch.OutOfMemoryError:
                pass  # what the traceback holds must be gone before memory is asked for again
            if not self.redo:
                raise UserError(
                    f"out of memory in a micro-batch of {self.tokens} tokens, which several processes cannot redo "
                    f"within a step: start again with --optim.token-budget {max(1, self.tokens // 2)}"
                )
            if undo is not None:
                undo()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # copies that were under way end before their memory is given to others
                torch.cuda.empty_cache()
            self._shrink(batches)
            batches = batches_of(self.tokens)
        if self.retries > before and self.tell is not None:
            self.tell(
                "warning: out of memory in a micro-batch; the step was redone with the same gradient at "
                f"{self.tokens} tokens, which holds from now on (set --optim.token-budget {self.tokens})"
            )
        return result

    def _shrink(self, batches: list[PackedBatch]) -> None:
        largest = max(batch.input_ids.shape[1] for batch in batches)
        longest = max(int(batch.position_ids.max()) + 1 for batch in batches)
        smaller = max(longest, largest // 2)
        if smaller == largest:
            raise UserError(
                f"out of memory on a micro-batch of {largest} tokens, which is one sequence and cannot be split: "
                "shorten completions (rollout.max_new_tokens), turn on policy.gradient_checkpointing, train an "
                "adapter (policy.lora_rank, policy.quantize nf4), or move memory aside (memory.optimizer host, "
                "memory.activations_on_host, optim.optimizer adamw8bit)"
            )
        self.tokens = self.state["tokens"] = smaller
        self.retries += 1
