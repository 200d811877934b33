"""What one step of GRPO, PPO and DPO does on one device: FLOPs by kind of work, passes, decoding steps, updates.

Letters: P prompts, G completions of each, S = P·G sequences, N completion tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedConfig

from benchmarks.cost import flops
from benchmarks.cost.architecture import Architecture
from benchmarks.cost.rates import Kind
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.models.lora import LoraSettings

Phase = Literal["generate", "reward", "reference", "values", "update"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step. Sequences have the lengths given here, all of them."""

    policy: PreTrainedConfig
    reward: PreTrainedConfig | None = None
    """The reward model's decoder; None: as the policy's"""
    objectives: int = 4
    """Outputs of the reward model"""
    lora: LoraSettings | None = None
    """Adapter of the policy, and of a value network; None: both are trained whole"""
    checkpointing: bool = False
    prompts: int = 128
    """P of all devices together"""
    group: int = 8
    """G: GRPO's groups, DPO's samples of a prompt; PPO has one completion each of P·G prompts"""
    prompt_tokens: int = 256
    new_tokens: int = 512
    token_budget: int = 16384
    """Positions of a micro-batch"""
    reward_budget: int = 16384
    """Positions of a row that is scored"""
    max_rows: int = 256
    """Completions that decode at once on a device"""
    kl: bool = True
    """Whether GRPO has a KL term, which needs the reference's log-probs; PPO and DPO cannot do without"""
    updates: int = 1
    """GRPO: passes over a rollout, an optimizer step each"""
    epochs: int = 2
    """PPO: passes over a rollout"""
    minibatches: int = 2
    """PPO: optimizer steps of a pass"""
    rounds: int = 1
    """DPO online: passes over a round's pairs"""
    reuse: int = 3
    """DPO offline: passes over the pairs that were sampled once; a step bears its share of the sampling"""
    gpus: int = 1
    causal: bool = True
    """Count attention by the pairs that see each other (`Architecture.causal`)"""

    def on_one(self) -> Job:
        """The share of one device, data-parallel: whole groups, the most any device has."""
        return replace(self, prompts=-(-self.prompts // self.gpus), gpus=1)


@dataclass(kw_only=True)
class Load:
    """The work of one phase on one device."""

    flops: dict[Kind, float] = field(default_factory=dict)
    layers: float = 0.0
    """Layers run, counted once a pass: each costs something however little there is to do (backward: twice)"""
    steps: float = 0.0
    """Decoding steps"""
    rows: int = 0
    """Completions that decode at once"""
    cached: float = 0.0
    """Keys and values a decoding step reads, on the average, of all rows and layers"""
    logits: float = 0.0
    """Drawn from"""
    updated: float = 0.0
    """Parameters updated, times optimizer steps"""

    def add(self, kind: Kind, work: float) -> None:
        self.flops[kind] = self.flops.get(kind, 0.0) + work

    def times(self, share: float) -> Load:
        """The same work `share` times."""
        return Load(
            flops={kind: share * work for kind, work in self.flops.items()},
            layers=share * self.layers,
            steps=share * self.steps,
            rows=self.rows,
            cached=self.cached,
            logits=share * self.logits,
            updated=share * self.updated,
        )

    @property
    def total(self) -> float:
        return sum(self.flops.values())


Step = dict[Phase, Load]


_known: dict[tuple, Architecture] = {}


def _architecture(
    config: PreTrainedConfig, lora: LoraSettings | None, heads: int, checkpointing: bool
) -> Architecture:
    """Read off once for each configuration."""
    key = (config.to_json_string(), lora, heads, checkpointing)
    if key not in _known:
        _known[key] = Architecture.of(config, lora, heads, checkpointing=checkpointing)
    return _known[key]


@dataclass(frozen=True)
class Sizes:
    """The architectures of a job's models."""

    policy: Architecture
    frozen: Architecture
    value: Architecture
    reward: Architecture

    @classmethod
    def of(cls, job: Job) -> Sizes:
        def read(
            config: PreTrainedConfig, lora: LoraSettings | None, heads: int, checkpointing: bool
        ) -> Architecture:
            return replace(_architecture(config, lora, heads, checkpointing), causal=job.causal)

        return cls(
            policy=read(job.policy, job.lora, 0, job.checkpointing),
            frozen=read(job.policy, None, 0, False),
            value=read(job.policy, job.lora, 1, job.checkpointing),
            reward=read(job.reward or job.policy, None, job.objectives, False),
        )


def packed(prompts: int, group: int, prompt: int, own: int, budget: int) -> tuple[PackedPlan, int]:
    """One plan of all sequences as `pack` lays them out, `own` positions each behind its prompt, and the rows it fills.

    A group that does not fit into a row has its prompt in several.
    """
    fitting = max(1, (budget - prompt) // max(own, 1))
    parts = [min(fitting, group - i) for i in range(0, group, fitting)]
    q_lens: list[int] = []
    prefixes: list[int] = []
    for part in parts:
        q_lens += [prompt, *[own] * part]
        prefixes += [0, *[prompt] * part]
    length = sum(q_lens)
    per_row = max(1, budget // max(prompt + own * part for part in parts)) if parts else 1
    units = prompts * len(parts)
    rows = max(-(-prompts * length // budget), 1) if length <= budget else -(-units // per_row)
    starts = (0,) * len(q_lens) * prompts
    return PackedPlan(tuple(q_lens) * prompts, starts, tuple(prefixes) * prompts), rows


def generate(job: Job, size: Architecture, prompts: int, group: int) -> Load:
    """A rollout by the built-in engine."""
    new, count = job.new_tokens, prompts * group
    load, layers = Load(), _depth(size)
    read = flops.body_forward(size, PackedPlan.of_lengths([job.prompt_tokens] * prompts))
    first = flops.head(size, prompts, "forward")
    total = flops.generation(size, [job.prompt_tokens] * prompts, [new] * count, group)
    load.add("forward", read)
    load.add("head", first)
    load.add("decode", total - read - first)
    load.rows = min(job.max_rows, count)
    load.steps = (new - 1) * count / load.rows
    seen = job.prompt_tokens / group + new / 2  # a prompt's are read once for its group
    load.cached = load.rows * sum(
        a.count * a.key_heads * (a.dim + a.value_dim) * min(seen, a.window or seen) for a in size.attention
    )
    load.layers = layers * (1 + load.steps)
    load.logits = size.vocabulary * count * new
    return load


def scored(job: Job, size: Architecture, prompts: int, group: int) -> Load:
    """A reward model reads every completion whole."""
    plan, rows = packed(prompts, group, job.prompt_tokens, job.new_tokens, job.reward_budget)
    load = Load()
    read = 2 * prompts * group * size.hidden * size.outputs
    load.add("forward", flops.body_forward(size, plan) + read)
    load.layers = rows * _depth(size)
    return load


def looked_up(job: Job, size: Architecture, prompts: int, group: int) -> Load:
    """Log-probs, or values where the model has outputs in place of a head."""
    plan, rows = packed(prompts, group, job.prompt_tokens, job.new_tokens - 1, job.token_budget)
    tokens, load = prompts * group * job.new_tokens, Load()
    load.add("forward", flops.body_forward(size, plan) + 2 * tokens * size.hidden * size.outputs)
    load.add("head", flops.head(size, tokens, "forward"))
    load.layers = rows * _depth(size)
    return load


def trained(
    job: Job, size: Architecture, prompts: int, group: int, *, updates: int, logprob: bool = False
) -> Load:
    """One pass of training over all completions in `updates` optimizer steps; the optimizer aside."""
    part = -(-prompts // updates)
    plan, rows = packed(part, group, job.prompt_tokens, job.new_tokens - 1, job.token_budget)
    tokens, load, share = prompts * group * job.new_tokens, Load(), prompts / part
    both = flops.body_forward(size, plan) + flops.body_backward(size, plan)
    load.add("training", share * both + 6 * tokens * size.hidden * size.outputs)
    kind = ("trained_logprob" if logprob else "trained") if size.trained_head else "frozen"
    load.add("head_trained", flops.head(size, tokens, kind))
    load.layers = 3 * rows * updates * _depth(size)
    return load


def _depth(size: Architecture) -> int:
    return sum(layers.count for layers in size.attention)


def _merged(*loads: Load) -> Load:
    """Several loads of one phase that does not decode."""
    total = Load()
    for load in loads:
        for kind, work in load.flops.items():
            total.add(kind, work)
        total.layers += load.layers
        total.updated += load.updated
    return total


def grpo(job: Job, parameters: int, value_parameters: int) -> Step:
    """A group a prompt, rewards, the reference where there is a KL term, `updates` passes."""
    s, p, g = Sizes.of(job), job.prompts, job.group
    step: Step = {"generate": generate(job, s.policy, p, g), "reward": scored(job, s.reward, p, g)}
    if job.kl:
        step["reference"] = looked_up(job, s.frozen, p, g)
    update = trained(job, s.policy, p, g, updates=1).times(job.updates)
    if job.updates > 1:
        update = _merged(update, looked_up(job, s.policy, p, g))
    update.updated = job.updates * parameters
    step["update"] = update
    return step


def ppo(job: Job, parameters: int, value_parameters: int, *, shared: bool = False) -> Step:
    """One completion a prompt, rewards, reference and values, epochs of minibatches over policy and value model."""
    s, p = Sizes.of(job), job.prompts * job.group
    update = trained(job, s.policy, p, 1, updates=job.minibatches)
    update.updated = job.minibatches * parameters
    if shared:
        # the values need the trunk alone
        values = looked_up(job, replace(s.policy, vocabulary=0, outputs=1), p, 1)
    else:
        values = looked_up(job, s.value, p, 1)
        network = trained(job, s.value, p, 1, updates=job.minibatches)
        network.updated = job.minibatches * value_parameters
        update = _merged(update, network)
    return {
        "generate": generate(job, s.policy, p, 1),
        "reward": scored(job, s.reward, p, 1),
        "reference": looked_up(job, s.frozen, p, 1),
        "values": values,
        # the old policy's log-probs first
        "update": _merged(update.times(job.epochs), looked_up(job, s.policy, p, 1)),
    }


def ppo_shared(job: Job, parameters: int, value_parameters: int) -> Step:
    """PPO with its value head on the policy's trunk."""
    return ppo(job, parameters, value_parameters, shared=True)


def dpo_online(job: Job, parameters: int, value_parameters: int) -> Step:
    """A round: G samples a prompt, the best and the worst make a pair, the reference once, passes over the pairs."""
    s, p = Sizes.of(job), job.prompts
    update = trained(job, s.policy, p, 2, updates=1, logprob=True)
    update.updated = parameters
    return {
        "generate": generate(job, s.policy, p, job.group),
        "reward": scored(job, s.reward, p, job.group),
        "reference": looked_up(job, s.frozen, p, 2),
        "update": update.times(job.rounds),
    }


def dpo(job: Job, parameters: int, value_parameters: int) -> Step:
    """An optimizer step on P pairs, and its share of sampling, ranking and reference, which are done once a pair."""
    step = dpo_online(replace(job, rounds=1), parameters, value_parameters)
    return {phase: load if phase == "update" else load.times(1 / job.reuse) for phase, load in step.items()}


ALGORITHMS: dict[str, Callable[[Job, int, int], Step]] = {
    "grpo": grpo,
    "ppo": ppo,
    "ppo_shared": ppo_shared,
    "dpo": dpo,
    "dpo_online": dpo_online,
}
