"""Memory of a step of GRPO, PPO and DPO on one of several devices, by part, from the planner and what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.cost.job import Job
from grpo_fast.memory.estimate import MemoryEstimate, Planner, Work
from grpo_fast.memory.passes import ParameterCounts

SHARDS = ("nothing", "optimizer", "models")
"""What the devices share out: nothing; optimizer and gradients; reference, reward and value model as well. The policy's
weights stay whole everywhere: each device generates with them."""
_SHARED = {
    "nothing": (),
    "optimizer": ("optimizer", "gradients"),
    "models": ("optimizer", "gradients", "reference", "reward_model", "value_model"),
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    parts: dict[str, int]
    """policy, reference, value_model, reward_model, optimizer, gradients, runtime (a CPU's process), and working: what
    the peak has beyond them"""
    peak: int
    shards: str
    """One of `SHARDS`"""
    counts: ParameterCounts
    """Of the policy"""
    value_parameters: int
    """Of a value network; 0 where there is none"""

    def shared_out(self, shards: str, gpus: int) -> Memory:
        """The same with some parts shared out among `gpus` devices."""
        parts = {k: -(-v // gpus) if k in _SHARED[shards] else v for k, v in self.parts.items()}
        saved = sum(self.parts.values()) - sum(parts.values())
        return replace(self, parts=parts, peak=self.peak - saved, shards=shards)


def memory(algorithm: str, job: Job, *, device: str, dtype: torch.dtype) -> Memory:
    """Of one device's share of a job (`Job.on_one`), nothing shared out."""
    sequences = job.prompts * job.group
    alone = algorithm in ("ppo", "ppo_shared")
    asked = {
        "lora": job.lora,
        "reference": job.kl or algorithm != "grpo",
        "token_budget": job.token_budget,
        "gradient_checkpointing": job.checkpointing,
        "prompts": sequences if alone else job.prompts,
        "minibatches": job.minibatches if alone else 1,
        "group_size": 1 if alone else job.group,
        "max_rows": job.max_rows,
    }
    planner = _planner(job, device, dtype)
    counts, found = planner.counts_and_estimate(**asked)
    if algorithm.startswith("dpo"):  # a pair of every prompt is trained on, the better and the worse
        update = planner.estimate(**asked | {"group_size": 2})
        beside = found.heap - update.heap
        phases = {**found.phases(), "update": update.update + max(0, beside)}
        found = replace(update, generate=phases["generate"], score=phases["score"], update=phases["update"])
    value = _value_parameters(job, counts) if algorithm == "ppo" else 0
    return _with_value_model(found, counts, value, dtype)


_planners: dict[tuple, Planner] = {}


def _planner(job: Job, device: str, dtype: torch.dtype) -> Planner:
    """One for all algorithms: what they have in common is counted once."""
    reward = job.reward or job.policy
    lengths = job.prompt_tokens, job.new_tokens, job.reward_budget
    key = (job.policy.to_json_string(), reward.to_json_string(), device, dtype, *lengths)
    if key not in _planners:
        _planners[key] = Planner(
            Work(
                policy=job.policy,
                device=device,
                dtype=dtype,
                prompt_tokens=job.prompt_tokens,
                new_tokens=job.new_tokens,
                reward_models=(reward,),
                reward_dtype=dtype,
                reward_tokens=job.reward_budget,
            )
        )
    return _planners[key]


def _value_parameters(job: Job, counts: ParameterCounts) -> int:
    """The policy's, with one output in the place of a head that is not the embedding."""
    text = job.policy.get_text_config(decoder=True)
    tied = bool(getattr(job.policy, "tie_word_embeddings", False))
    return counts.total - (0 if tied else counts.head) + text.hidden_size


def _with_value_model(
    found: MemoryEstimate, counts: ParameterCounts, value: int, dtype: torch.dtype
) -> Memory:
    """The planner's estimate and a value network of `value` parameters, all trained, with an AdamW of its own."""
    weights, gradients = value * dtype.itemsize, 4 * value
    states = value * (8 + (4 if dtype != torch.float32 else 0))
    parts = {
        "policy": found.parameters,
        "reference": found.reference,
        "value_model": weights,
        "reward_model": found.reward_models,
        "optimizer": found.optimizer + states,
        "gradients": found.gradients + gradients,
        "runtime": found.runtime,
    }
    resident = weights + states
    phases = (found.generate + resident, found.score + resident, found.update + resident + gradients)
    peak = max(phases)
    working = peak - sum(parts.values())
    if working < 0:  # the peak is not the update's, and has no gradients
        parts["gradients"], working = max(0, parts["gradients"] + working), 0
    parts["working"] = working
    return Memory(parts=parts, peak=peak, shards="nothing", counts=counts, value_parameters=value)
