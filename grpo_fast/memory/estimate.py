"""The memory of a run, part by part and phase by phase, before anything is loaded.

On a GPU it is what PyTorch's allocator hands out; on the CPU the process's resident memory. Sequences are taken to be
as long as the settings allow, and packed rows to be full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from grpo_fast.memory.attention import row_plan
from grpo_fast.memory.passes import (
    ParameterCounts,
    UpdateBytes,
    completion_positions,
    count_parameters,
    meta_policy,
    prefill_bytes,
    scoring_bytes,
    update_bytes,
)
from grpo_fast.memory.scratch import cache_bytes, decode_bytes, head_scratch, sampling_bytes
from grpo_fast.models.lora import LoraSettings

RUNTIME_BYTES = 505 << 20
"""CPU: Python with torch, transformers and peft imported, and the first matrix products' buffers (torch 2.13)."""
HEAP_BYTES = 60 << 20
HEAP_SHARE = 0.75
HEAP_SHARE_LORA = 1.5
"""CPU: what the C library's heap holds beyond the tensors alive: a floor, and a share of what is kept for the backward
pass, larger with an adapter. Fitted with glibc to `benchmarks/results/memory-cpu.json`; one of its 18 cases, an adapter
with checkpointing, stays too low."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run does, as far as memory is concerned."""

    policy: PreTrainedConfig
    device: str = "cpu"
    """cpu or cuda"""
    dtype: torch.dtype = torch.float32
    lora: LoraSettings | None = None
    reference: bool = False
    """Whether the KL term needs a frozen copy of a fully trained policy; an adapter is switched off instead"""
    entropy: bool = False
    """Whether the loss has an entropy term, which doubles the head's scratch"""
    token_budget: int = 8192
    gradient_checkpointing: bool = False
    prompts: int = 16
    """Prompts of one step"""
    minibatches: int = 1
    """Optimizer steps a pass"""
    group_size: int = 8
    prompt_tokens: int = 512
    new_tokens: int = 256
    max_rows: int = 256
    """Completions generated at the same time"""
    prefill_tokens: int = 16384
    eval_prompts: int = 0
    """Held-out prompts, one completion each"""
    truncates: bool = False
    """Whether sampling cuts the tail off (top_k, top_p, min_p)"""
    reward_models: tuple[PreTrainedConfig, ...] = ()
    reward_dtype: torch.dtype = torch.float32
    reward_tokens: int = 16384
    """Token budget of the scoring"""
    overlap: bool = False
    """Whether finished groups are scored while others are generated"""
    state_bytes: float = 8.0
    """Optimizer's state of a trained parameter, its float32 master copy aside: AdamW 8, in 8 bit about 2"""
    factored: bool = False
    """Adafactor: a number a row and a column instead of `state_bytes`"""
    frozen_bytes: float | None = None
    """Bytes of a frozen linear layer's weight where it is stored in fewer bits; None: those of dtype"""
    optimizer_on_host: bool = False
    """Optimizer's state, masters and gradient sums off the GPU"""
    optimizer_parked: bool = False
    """State and masters off the GPU while completions are generated"""
    ahead: bool = False
    """Whether the next completions are generated, by a copy of the weights, while this step is trained"""
    engine: bool = True
    """Whether the completions are generated in this process"""
    engine_sleeps: bool = False
    """Whether the engine gives its cache back while the policy is trained"""
    server_share: float = 0.0
    """Share of the same GPU that a server which generates keeps for itself"""
    merged_copies: bool = False
    """Whether the adapted layers' weights are held twice while completions are generated"""
    fp8_cache: bool = False
    """Keys and values of the rollouts in 8 bits"""
    activations_on_host: bool = False
    """Kept tensors off the GPU until their backward pass"""
    ranks: int = 1
    """Processes that share weights, gradients and states out; the estimate is one's"""
    reduced_each: bool = False
    """Whether gradients are summed over processes after each micro-batch, so that none holds the whole"""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the training device, part by part, and at the peak of each phase."""

    runtime: int
    """CPU: the process without a tensor (`RUNTIME_BYTES`)."""
    parameters: int
    """The policy's weights."""
    reference: int
    """The frozen copy for the KL term."""
    reward_models: int
    """Their weights."""
    optimizer: int
    """State, and the float32 masters of narrower parameters."""
    gradients: int
    """One float32 number a trained parameter."""
    activations: int
    """What one micro-batch keeps for its backward pass."""
    backward: int
    """What the backward pass holds at its peak beyond kept tensors and gradients."""
    head: int
    """Results and scratch of the loss head, where that is the update's peak or not."""
    optimizer_work: int
    """Temporaries of the optimizer's step."""
    cache: int
    """Keys and values of the rollouts in flight, and of the prompts just read."""
    sampling: int
    """Logits of a decoding step and what drawing takes."""
    scoring: int
    """The reward models' forward pass."""
    heap: int
    """CPU: freed memory that cannot be reused (`HEAP_SHARE`)."""
    generate: int
    """Peak while completions are generated."""
    score: int
    """Peak while they are scored."""
    update: int
    """Peak of the update."""

    @property
    def peak(self) -> int:
        """The largest phase."""
        return max(self.generate, self.score, self.update)

    def parts(self) -> dict[str, int]:
        """Every part, the phases left out."""
        return {k: v for k, v in asdict(self).items() if k not in ("generate", "score", "update")}

    def phases(self) -> dict[str, int]:
        return {"generate": self.generate, "score": self.score, "update": self.update}


class Planner:
    """Estimates of one run under different settings; what a setting does not touch is counted once."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._known: dict[tuple, Any] = {}

    def changed(self, **changes: Any) -> Planner:
        """A planner of the same models with fields of its `Work` changed; what was counted already is known to it."""
        other = Planner(replace(self.work, **changes))
        other._known = self._known
        return other

    def estimate(self, **changes: Any) -> MemoryEstimate:
        """The memory of the run with fields of its `Work` changed."""
        return self.counts_and_estimate(**changes)[1]

    def counts_and_estimate(self, **changes: Any) -> tuple[ParameterCounts, MemoryEstimate]:
        """The policy's parameters beside it."""
        work = replace(self.work, **changes)
        counts, update, tokens = self._once(
            _update,
            work,
            (
                "lora",
                "dtype",
                "token_budget",
                "gradient_checkpointing",
                "prompts",
                "minibatches",
                "group_size",
            ),
        )
        generating = self._once(_generate, work, ("dtype", "max_rows", "prompts", "group_size"))
        scored = self._once(_score, work, ("reward_dtype", "prompts", "group_size"))
        return counts, _total(work, counts, update, tokens, generating, scored)

    def _once(self, count: Callable[[Work], Any], work: Work, fields: tuple[str, ...]) -> Any:
        key = (count, *(getattr(work, field) for field in fields))
        if key not in self._known:
            self._known[key] = count(work)
        return self._known[key]


def _update(work: Work) -> tuple[ParameterCounts, UpdateBytes, int]:
    """Parameters, the passes of a full micro-batch, and its completion tokens."""
    longest = work.prompt_tokens + work.new_tokens - 1
    prompts = -(-work.prompts // work.minibatches)
    whole = prompts * (work.prompt_tokens + work.group_size * (work.new_tokens - 1))
    length = min(max(work.token_budget, longest), whole)
    plan = row_plan(length, work.prompt_tokens, work.new_tokens - 1, work.group_size)
    model = meta_policy(
        work.policy, dtype=work.dtype, lora=work.lora, gradient_checkpointing=work.gradient_checkpointing
    )
    found = update_bytes(model, plan, work.device, micro_batches=-(-whole // length))
    return count_parameters(model), found, completion_positions(plan)


def _generate(work: Work) -> dict[str, int]:
    """Bytes of cache and sampling, and of generation at its peak: of a step's rollouts or of an evaluation."""
    model = meta_policy(work.policy, dtype=work.dtype).eval()
    rounds = [
        _generation(work, model, prompts, each)
        for prompts, each in ((work.prompts, work.group_size), (work.eval_prompts, 1))
        if prompts
    ]
    return max(rounds, key=lambda found: found["peak"])


def _generation(work: Work, model: PreTrainedModel, prompts: int, each: int) -> dict[str, int]:
    """`each` completions of `prompts` prompts."""
    text = work.policy.get_text_config(decoder=True)
    rows = min(work.max_rows, prompts * each)
    most = max(1, work.prefill_tokens // work.prompt_tokens)
    read = min(most, -(-rows // each))
    kept, reading = prefill_bytes(model, [work.prompt_tokens] * read, work.device)
    first, last = cache_bytes(
        work.policy,
        work.dtype,
        device=work.device,
        rows=rows,
        each=each,
        waiting=rows < prompts * each,
        prompt=work.prompt_tokens,
        new=work.new_tokens,
        fp8=work.fp8_cache,
    )
    softcap = bool(getattr(text, "final_logit_softcapping", None))
    drawn = sampling_bytes(
        rows, text.vocab_size, work.dtype, softcap=softcap, truncates=work.truncates
    ) + sampling_bytes(read, text.vocab_size, work.dtype, softcap=softcap, truncates=False)
    decoding = decode_bytes(work.policy, work.dtype, rows=rows, span=work.prompt_tokens + work.new_tokens)
    decoding += sampling_bytes(rows, text.vocab_size, work.dtype, softcap=softcap, truncates=work.truncates)
    # Rows that wait enter while the cache of the others is full.
    beside = last if rows < prompts * each or read * each < rows else first
    peak = max(beside + max(reading, kept + drawn), last + decoding)
    return {"cache": last + kept, "sampling": drawn, "peak": peak}


def _score(work: Work) -> list[tuple[int, int]]:
    """Weights and peak of every reward model's forward pass."""
    trained = work.prompts * (work.prompt_tokens + work.group_size * work.new_tokens)
    evaluated = work.eval_prompts * (work.prompt_tokens + work.new_tokens)
    longest = work.prompt_tokens + work.new_tokens
    length = min(max(work.reward_tokens, longest), max(trained, evaluated))
    plan = row_plan(length, work.prompt_tokens, work.new_tokens, work.group_size)
    return [scoring_bytes(model, plan, work.device, work.reward_dtype) for model in work.reward_models]


def _total(
    work: Work,
    counts: ParameterCounts,
    update: UpdateBytes,
    tokens: int,
    generating: dict[str, int],
    scored: list[tuple[int, int]],
) -> MemoryEstimate:
    text = work.policy.get_text_config(decoder=True)
    item, on_gpu, full = work.dtype.itemsize, work.device == "cuda", work.lora is None
    parameters = (counts.total + counts.adapter) * item
    if work.frozen_bytes is not None:
        parameters -= round(counts.frozen_linear * (item - work.frozen_bytes))
    masters = 4 * counts.trained if item != 4 else 0
    state = 4 * counts.factored if work.factored else round(work.state_bytes * counts.trained)
    optimizer = 0 if on_gpu and work.optimizer_on_host else masters + state
    optimizer_work = 2 * 4 * counts.largest if work.factored else 0
    reference = counts.total * item if full and work.reference else 0
    if work.ahead and work.ranks == 1:
        parameters *= 2
    rewards = sum(weights for weights, _ in scored)
    scoring = max((peak for _, peak in scored), default=0)
    scratch = head_scratch(
        tokens,
        text.vocab_size,
        text.hidden_size,
        work.dtype,
        device=work.device,
        trained=full,
        entropy=work.entropy,
    )
    gradients, gathered = update.gradients, 0
    if work.ranks > 1:
        parameters, gradients, gathered = _shared_out(work, counts, update)
        optimizer, reference = state // work.ranks, reference // work.ranks
    kept = update.kept
    if on_gpu and work.activations_on_host:
        kept = min(kept, 2 * kept // text.num_hidden_layers)  # one layer's arrive while another's are used
    moved = update.kept - kept
    resident = parameters + reference + rewards + optimizer
    sums = gradients
    if on_gpu and work.optimizer_on_host:
        left = min(sums, 2 * counts.largest * item)  # on their way out
        moved, sums = moved + sums - left, left
    moved += update.gradients - gradients
    updating = gathered + max(update.at_head - moved + scratch, update.peak - moved, sums + optimizer_work)
    held = 0
    if work.ahead:
        updating += generating["peak"]
    elif on_gpu and work.engine and not work.engine_sleeps:
        held = generating["cache"]
    making = generating["peak"] + (counts.frozen_linear * item if work.merged_copies else 0)
    if not work.engine:
        making = held = 0
    share = HEAP_SHARE if full else HEAP_SHARE_LORA
    heap = 0 if on_gpu else HEAP_BYTES + round(share * update.kept)
    runtime = 0 if on_gpu else RUNTIME_BYTES
    always = runtime + heap + resident
    return MemoryEstimate(
        runtime=runtime,
        parameters=parameters,
        reference=reference,
        reward_models=rewards,
        optimizer=optimizer,
        gradients=sums,
        activations=kept,
        backward=max(0, update.peak - update.gradients - update.kept),
        head=scratch + (4 * counts.head if full else 0),
        optimizer_work=optimizer_work,
        cache=generating["cache"],
        sampling=generating["sampling"],
        scoring=scoring,
        heap=heap,
        generate=always
        - (optimizer if on_gpu and work.optimizer_parked else 0)
        + making
        + (scoring if work.overlap else 0),
        score=always + held + scoring if scored else 0,
        update=always + held + updating,
    )


def _shared_out(work: Work, counts: ParameterCounts, update: UpdateBytes) -> tuple[int, int, int]:
    """Of one of several processes: its weights and its engine's, its gradients, and what is gathered at a time.

    Gathered are the root's weights (embedding and head) and two layers, one of which is on its way.
    """
    item = work.dtype.itemsize
    frozen = counts.total + counts.adapter - counts.trained
    own = (4 * counts.trained + item * frozen) // work.ranks
    engine = (counts.total + counts.adapter) * item if work.engine else 0
    layers = work.policy.get_text_config(decoder=True).num_hidden_layers
    layer = (counts.total - counts.head) // layers
    gradients = update.gradients
    if work.reduced_each:
        gradients = gradients // work.ranks + 4 * min(counts.trained, layer)
    return own + engine, gradients, item * (counts.head + 2 * layer)


def rough_bytes(work: Work) -> int:
    """More than the run can need, told in a hundredth of the time: where even this fits, nothing has to be counted."""
    text = work.policy.get_text_config(decoder=True)
    counts = count_parameters(meta_policy(work.policy, lora=work.lora))
    parameters = counts.total + counts.adapter
    rewards = sum(count_parameters(meta_policy(model)).total for model in work.reward_models)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    width = max(text.hidden_size, text.num_attention_heads * (getattr(text, "head_dim", None) or 0))
    layer = 4 * (32 * width + 12 * inner)  # of a position, with an adapter on every linear layer
    longest = work.prompt_tokens + work.new_tokens
    tokens = max(work.token_budget, longest)
    rows = min(work.max_rows, max(work.prompts * work.group_size, work.eval_prompts))
    cache = rows * 2 * longest * 2 * 4 * width * text.num_hidden_layers
    bytes_held = (
        parameters * (3 * 4 + work.state_bytes + 8)
        + 8 * counts.head
        + rewards * 4
        + (tokens * text.num_hidden_layers + 4 * work.reward_tokens + 4 * work.prefill_tokens) * layer
        + cache
        + 50 * rows * text.vocab_size
    )
    return round(RUNTIME_BYTES + 2 * bytes_held)
