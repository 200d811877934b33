"""Ways to take a GRPO step and to generate, each called again and again: ours, a plain one, and TRL in its own Python.

Letters: P prompts, G completions a prompt, S = P·G, T tokens of a row.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.step import reward
from benchmarks.step.work import LEARNING_RATE, Size, config_of, task_of
from grpo_fast.config.settings import TrainConfig
from grpo_fast.engines.base import Completion
from grpo_fast.engines.local import LocalEngine
from grpo_fast.grpo import update
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.rollout import Rollout, collect, rollout_metrics
from grpo_fast.scoring import Scored
from grpo_fast.task import Task

PEER = Path(__file__).parents[1] / "peers" / "trl_grpo.py"
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
"""What `run.allocator` sets here, as environment variables for a peer."""


def engine_of(policy: Policy, config: TrainConfig) -> LocalEngine:
    """The engine that the training command would use."""
    return LocalEngine(policy.model, max_rows=config.rollout.max_rows)


def optimizer_of(policy: Policy, config: TrainConfig) -> Optimizer:
    """The optimizer that the training command would use."""
    optim = config.optim
    return Optimizer(
        policy.trainable_parameters(),
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        max_grad_norm=optim.max_grad_norm,
        kind=optim.optimizer,
    )


class OurStep:
    """The training loop's own functions in its own order, on all prompts each time."""

    def __init__(self, policy: Policy, size: Size, config: TrainConfig | None = None) -> None:
        self.config = config or config_of(size)
        self.policy = policy
        self.task = task_of(policy, size, self.config)
        self.engine = engine_of(policy, self.config)
        self.optimizer = optimizer_of(policy, self.config)
        self.taken = 0

    def __call__(
        self, timer: Callable[[str], AbstractContextManager[None]] | None = None
    ) -> dict[str, float]:
        """One step; its metrics."""
        self.taken += 1
        scorer = self.task.scorer
        rollout = collect(
            self.task.prompts,
            self.task,
            self.engine,
            self.config,
            weights=scorer.weights,
            seed=self.taken,
            timer=timer or (lambda _: nullcontext()),
        )
        metrics = update(self.policy, self.optimizer, rollout, self.config, lr=LEARNING_RATE)
        self.engine.push(self.policy.model.named_parameters(), self.taken)
        return metrics | rollout_metrics(rollout, scorer.names, self.config.rollout.group_size)


def random_rollout(task: Task, size: Size) -> Rollout:
    """Random completions with random advantages, as `collect` would hand them over."""
    draw = torch.Generator().manual_seed(0)
    count, vocabulary = size.prompts * size.group, len(task.policy.tokenizer) - 2
    ids = torch.randint(vocabulary, (count, size.new_tokens), generator=draw).tolist()
    logprobs = torch.full((size.new_tokens,), -math.log(vocabulary))
    return Rollout(
        prompts=task.prompts,
        prompt_of=[p for p in range(size.prompts) for _ in range(size.group)],
        completions=[Completion(row, logprobs, "length", 0) for row in ids],
        texts=[""] * count,
        scored=Scored(rewards=torch.zeros(count, 1), spread=torch.zeros(count, 1)),
        advantages=torch.randn(count, generator=draw),
    )


class PlainStep:
    """What one writes by hand in an afternoon: `generate`, one padded forward pass, logits in memory, AdamW."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: Size) -> None:
        self.model, self.tokenizer, self.size = model, tokenizer, size
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.generate = Generate(model, size)

    def __call__(self, prompt_ids: Tensor) -> None:  # (P, T)
        """One step."""
        ids = self.generate(prompt_ids)
        completions = ids[:, prompt_ids.shape[1] :]
        decoded = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = torch.tensor(reward.even_digits(decoded)).view(-1, self.size.group)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-6)).view(-1).to(ids.device)
        self.model.train()
        loss = padded_loss(self.model, ids, completions, advantages)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def padded_loss(
    model: PreTrainedModel,
    ids: Tensor,  # (S, T) prompt and completion, padding on the right
    completions: Tensor,  # (S, C)
    advantages: Tensor,  # (S,)
    mask: Tensor | None = None,  # (S, C)
    old_logprobs: Tensor | None = None,  # (S, C)
    clip: float = 0.2,
) -> Tensor:
    """GRPO's loss through the whole logits. Prompts have one length, so completions begin at one column."""
    width = completions.shape[1]
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, completions[..., None])[..., 0]
    ratio = torch.exp(logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs))
    weights = advantages[:, None]
    surrogate = -torch.minimum(ratio * weights, ratio.clamp(1 - clip, 1 + clip) * weights)
    if mask is None:
        return surrogate.mean(1).mean()
    return ((surrogate * mask).sum(1) / mask.sum(1)).mean()


class Generate:
    """`model.generate`: G sampled sequences of each prompt in one batch, temperature 1, no truncation."""

    def __init__(self, model: PreTrainedModel, size: Size) -> None:
        self.model = model
        self.config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=size.new_tokens,
            num_return_sequences=size.group,
            eos_token_id=None,
            pad_token_id=model.generation_config.pad_token_id,
        )

    @torch.no_grad()
    def __call__(self, prompt_ids: Tensor) -> Tensor:  # (P, T) -> (S, T + C)
        self.model.eval()
        mask = torch.ones_like(prompt_ids)
        return self.model.generate(prompt_ids, attention_mask=mask, generation_config=self.config)  # type: ignore


def batching(device: torch.device | str, sequences: int) -> dict[str, Any]:
    """Continuous batching sizes itself by the GPU's memory; on a CPU it is told, and much faster for it."""
    return (
        {} if torch.device(device).type == "cuda" else {"num_blocks": 2 * sequences, "max_batch_tokens": 4096}
    )


class GenerateBatch:
    """transformers' continuous batching. Every sequence is a request of its own: several of one prompt get lost."""

    def __init__(self, model: PreTrainedModel, size: Size) -> None:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self.model, self.group = model, size.group
        self.config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=size.new_tokens, eos_token_id=-1,
            pad_token_id=model.generation_config.pad_token_id,
        )  # fmt: skip
        sequences = size.prompts * size.group
        self.batching = ContinuousBatchingConfig(
            allow_block_sharing=False, **batching(model.device, sequences)
        )

    @torch.no_grad()
    def __call__(self, prompt_ids: Tensor) -> list[list[int]]:
        """(P, T) -> S lists of new tokens. Raises ValueError where sequences are missing or too short."""
        self.model.eval()
        requests = prompt_ids.repeat_interleave(self.group, 0).tolist()
        found = self.model.generate_batch(  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            requests,
            generation_config=self.config,
            continuous_batching_config=self.batching,
            progress_bar=False,
        )
        tokens = [output.generated_tokens for output in found.values()]
        lengths = {len(row) for row in tokens}
        if len(tokens) != len(requests) or lengths != {self.config.max_new_tokens}:
            raise ValueError(f"{len(tokens)} of {len(requests)} sequences, of lengths {sorted(lengths)}")
        return tokens


class Peer:
    """TRL's `GRPOTrainer` in a process of its own, which takes one step whenever it is asked to."""

    def __init__(self, python: str, spec: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [python, str(PEER), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | (environment or {}),
        )
        self.ready = self._answer()

    def step(self) -> float:
        """Seconds of one whole step. Raises RuntimeError with the process's last words when it is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except OSError:
            raise RuntimeError(self._last_words()) from None
        return self._answer()["seconds"]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        self._process.wait(timeout=60)
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"TRL ended: {lines[-1] if lines else 'without a word'}"
