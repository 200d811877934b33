"""FLOPs of generating, scoring and training, in closed form: two for each multiply-add of a matrix product.

Counted are the matrix products of the transformer (attention's among them) and of the head, with what is computed
twice: scores that a fused attention makes again in its backward pass, layers that checkpointing repeats, logits that
`linear_logprob` makes again. Left out is all that grows with the number of elements alone: norms, activations,
softmax, sampling, the optimizer; and merging adapters, once a rollout.

Attention is counted by the pairs of query and key that see each other (`Architecture.causal`): a packed segment's
causal half, and its whole rectangle against a shared prefix. That is what the method needs, and what fused kernels come
near. `replace(architecture, causal=False)` counts whole rectangles, which is how `torch.utils.flop_counter` counts.

Letters: L positions of a row, N completion tokens, S sequences, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from benchmarks.cost.architecture import Architecture, AttentionLayers
from grpo_fast.attention.plan import PackedPlan
from grpo_fast.packing import PackedBatch

HeadPass = Literal["forward", "frozen", "trained", "trained_logprob"]
HEAD: dict[HeadPass, int] = {"forward": 2, "frozen": 4, "trained": 6, "trained_logprob": 8}
"""FLOPs of the head, times N·V·H: log-probs alone; both passes with a frozen head; both passes of `linear_grpo_loss`;
both passes of `linear_logprob`, which makes the logits again (`kernels/README.md`)."""


def body_forward(architecture: Architecture, batch: PackedBatch | PackedPlan) -> int:
    """FLOPs of one forward pass of a packed row through all layers."""
    plan = _plan(batch)
    attended = sum(_pairs(architecture, plan, a) * _products(a, 1, 1) for a in architecture.attention)
    return 2 * (plan.length * architecture.forward + attended)


def body_backward(architecture: Architecture, batch: PackedBatch | PackedPlan) -> int:
    """FLOPs of the backward pass after `body_forward`: about twice as many, once with an adapter.

    Attention has five products where forward has two: scores again, and the gradients of probabilities, values, queries
    and keys. Kernels that keep the probabilities of short rows do without the first.
    """
    plan = _plan(batch)
    repeated = int(architecture.checkpointing)
    attended = sum(
        _pairs(architecture, plan, a) * _products(a, 3 + repeated, 2 + repeated)
        for a in architecture.attention
    )
    each = architecture.by_input + architecture.by_weight + architecture.recomputed
    return 2 * (plan.length * each + attended)


def head(architecture: Architecture, tokens: int, kind: HeadPass) -> int:
    """FLOPs of the language model's head on the `tokens` (N) hidden states that reach it.

    `linear_grpo_loss` leaves out tokens that cannot carry a gradient: do not count these.
    """
    return HEAD[kind] * tokens * architecture.vocabulary * architecture.hidden


def logprobs(architecture: Architecture, batches: Iterable[PackedBatch]) -> int:
    """FLOPs of looking up the log-probs of completions: of a reference, or of the policy before its updates."""
    return sum(
        body_forward(architecture, batch) + head(architecture, len(batch.targets), "forward")
        for batch in batches
    )


def training(
    architecture: Architecture, batches: Iterable[PackedBatch], *, logprob_loss: bool = False
) -> int:
    """FLOPs of forward and backward passes of a policy: the loss by `linear_grpo_loss`, as GRPO and PPO have it, or
    by `linear_logprob` (`logprob_loss`), as DPO has it.
    """
    kind: HeadPass = "trained_logprob" if logprob_loss else "trained"
    if not architecture.trained_head:
        kind = "frozen"
    return sum(
        body_forward(architecture, batch)
        + body_backward(architecture, batch)
        + head(architecture, len(batch.targets), kind)
        for batch in batches
    )


def scoring(architecture: Architecture, batches: Iterable[PackedBatch], *, backward: bool = False) -> int:
    """FLOPs of a reward or value model's pass over packed rows; with `backward` that of its training.

    Its outputs are read at each sequence's last position where the batch was packed with `keep_last` (a reward model),
    and otherwise at each of the N positions that predict a token (a value model).
    """
    total = 0
    for batch in batches:
        read = len(batch.targets) if batch.last_index is None else len(batch.last_index)
        total += body_forward(architecture, batch) + (body_backward(architecture, batch) if backward else 0)
        total += (6 if backward else 2) * read * architecture.hidden * architecture.outputs
    return total


def generation(
    architecture: Architecture,
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    group_size: int,
) -> int:
    """FLOPs of the built-in engine: every prompt once, then each row's tokens one at a time.

    `completion_lengths` group by group, `group_size` a prompt. A completion's first token is drawn from its prompt's
    last state and its last one is never an input: a completion of C tokens takes C - 1 steps through body and head.
    ValueError where the numbers do not fit.
    """
    if len(completion_lengths) != len(prompt_lengths) * group_size:
        raise ValueError(
            f"completion_lengths must have {len(prompt_lengths)} · {group_size} entries, "
            f"got {len(completion_lengths)}"
        )
    total = body_forward(architecture, PackedPlan.of_lengths(prompt_lengths)) if prompt_lengths else 0
    steps = attended = 0
    for i, length in enumerate(completion_lengths):
        taken, prompt = max(length - 1, 0), prompt_lengths[i // group_size]
        steps += taken
        attended += sum(
            _visible(taken, prompt, a.window) * a.count * a.heads * (a.dim + a.value_dim)
            for a in architecture.attention
        )
    total += 2 * (steps * architecture.forward + attended)
    return total + head(architecture, len(prompt_lengths) + steps, "forward")


def _plan(batch: PackedBatch | PackedPlan) -> PackedPlan:
    return batch if isinstance(batch, PackedPlan) else batch.plan


def _products(layers: AttentionLayers, over_dim: int, over_values: int) -> int:
    """Multiply-adds of one pair in all these layers, from the number of products over D and over Dv."""
    return layers.count * layers.heads * (over_dim * layers.dim + over_values * layers.value_dim)


def _pairs(architecture: Architecture, plan: PackedPlan, layers: AttentionLayers) -> int:
    """Pairs of query and key in one layer."""
    segments = zip(plan.q_lens, plan.prefix_lens, strict=True)
    if not architecture.causal:
        return sum(own * (prefix + own) for own, prefix in segments)
    return sum(_visible(own, prefix, layers.window) for own, prefix in segments)


def _visible(own: int, prefix: int, window: int | None) -> int:
    """Keys seen by `own` positions behind `prefix` others: the i-th sees prefix + i of them, at most `window`."""
    if window is None or window >= prefix + own:
        return own * prefix + own * (own + 1) // 2
    free = max(0, min(own, window - prefix))  # positions that still see everything before them
    return free * prefix + free * (free + 1) // 2 + (own - free) * window
