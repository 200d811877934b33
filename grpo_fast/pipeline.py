"""Step after step's rollout: which prompts, groups without signal replaced, and one step ahead where that is asked for.

Letters: P prompts of a step, R objectives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.queue import PromptQueue
from grpo_fast.engines.base import RolloutEngine
from grpo_fast.errors import UserError
from grpo_fast.rollout import Rollout, Timer, collect, refilled, rollout_of
from grpo_fast.rollout_codec import Answers
from grpo_fast.task import Task

ROUND_SEEDS = 1 << 24
"""Distance between the seeds of a step's rounds: more than there are steps."""


class Pipeline:
    """Gives each step its rollout; a context manager.

    With `rollout.ahead` the next step's completions are generated and scored in a thread, by weights that are pushed
    to the engine before the step's update, while the step trains: the engine then has weights of its own. Rollouts
    depend on the step and the weights alone, so a run gives the same metrics every time.
    """

    def __init__(
        self, queue: PromptQueue, task: Task, engine: RolloutEngine, config: TrainConfig, *, timer: Timer
    ) -> None:
        self._queue, self._task, self._engine, self._config = queue, task, engine, config
        self._timer = timer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        device = task.policy.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and config.rollout.ahead else None
        self._coming: Future[tuple[Rollout, dict[str, float]]] | None = None
        self.metrics: dict[str, float] = {}
        """Of the last rollout: groups replaced, seconds generated ahead."""

    def __enter__(self) -> Pipeline:
        return self

    def pending(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The rollout generated ahead, once it is there, as a checkpoint keeps it; nothing where there is none."""
        if self._coming is None:
            return {}, {}
        rollout, metrics = self._coming.result()
        plain = rollout.answers.plain() | {
            "prompts": self._index_of(rollout),
            "metrics": metrics,
            "queue": self._queue.taken,
        }
        return rollout.answers.tensors() | {"advantages": rollout.advantages}, plain

    def take_up(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """The reverse: what `pending` gave is the next rollout."""
        if not plain:
            return
        try:
            prompts = [self._task.prompts[index] for index in plain["prompts"]]
            answers = Answers.of(tensors, plain)
            rollout = rollout_of(prompts, answers, tensors["advantages"])
            metrics = dict(plain["metrics"])
            self._queue.taken = plain["queue"]
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(
                f"the batch that was generated ahead cannot be taken up ({what}): its checkpoint was put together by "
                "something else"
            ) from error
        self._coming = Future()
        self._coming.set_result((rollout, metrics))

    def _index_of(self, rollout: Rollout) -> list[int]:
        places = {id(prompt): place for place, prompt in enumerate(self._task.prompts)}
        return [places[id(prompt)] for prompt in rollout.prompts]

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def rollout(self, step: int, weights: Tensor, *, ahead: bool) -> Rollout:
        """The rollout of `step`; with `ahead` that of the next one is begun.

        `weights` (R,): the objectives' weights.
        """
        if self._coming is None:
            self._push(step)
            rollout, self.metrics = self._make(step, weights, self._timer)
        else:
            with self._timer("generate"):
                rollout, self.metrics = self._coming.result()
        self._coming = None
        self._queue.settle()
        if ahead:
            self._push(step)
            self._coming = self._thread.submit(self._make_aside, step + 1, weights)
        return rollout

    def _push(self, version: int) -> None:
        self._engine.push(self._task.policy.named_weights(), version)

    def _make_aside(self, step: int, weights: Tensor) -> tuple[Rollout, dict[str, float]]:
        """The same in the thread, on a CUDA stream of its own."""
        started = time.perf_counter()
        if self._stream:
            self._stream.wait_stream(torch.cuda.default_stream(self._task.policy.device))
        with torch.cuda.stream(self._stream):
            rollout, metrics = self._make(step, weights, lambda _: nullcontext())
        return rollout, metrics | {"time/ahead_s": time.perf_counter() - started}

    def _make(
        self, step: int, weights: Tensor, timer: Callable[[str], AbstractContextManager[None]]
    ) -> tuple[Rollout, dict[str, float]]:
        config, task = self._config, self._task
        seed = (config.seed << 32) + step + 1

        def groups(count: int, seed: int) -> Rollout:
            indices = self._queue.take(count)
            prompts = [task.prompts[index] for index in indices]
            found = collect(prompts, task, self._engine, config, weights=weights, seed=seed, timer=timer)
            self._queue.record(indices, found.flat)
            return found

        rollout = groups(config.rollout.prompts_per_step, seed)
        replaced, generated = 0, rollout.tokens
        for attempt in range(1, config.rollout.refill + 1):
            missing = sum(rollout.flat)
            if not missing:
                break
            more = groups(missing, seed + attempt * ROUND_SEEDS)
            generated += more.tokens
            rollout = refilled(rollout, more, task.scorer, config, weights)
            replaced += missing - sum(rollout.flat)
        metrics = {"refilled_groups": float(replaced)} if config.rollout.refill else {}
        return rollout, metrics | {"generated_tokens": float(generated)}
