"""The step's parts, each as it is and with one idea removed, ready to be called again and again.

`matrix_flops` counts the arithmetic of the weights' products: 2 a weight and position forward, 6 with the backward
pass, and the vocabulary product by its kernel (6·N·V·H fused, 8 where log-probs come first, 6 with stored logits).
Attention's own products are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss, linear_logprob
from torch import Tensor

from benchmarks.ablations.work import World
from benchmarks.step.passes import (
    LOSS,
    LossOf,
    cleared,
    fused_loss,
    gradients_of,
    packed_pass,
    padded_pass,
    positions_of,
    rectangle,
)
from grpo_fast.engines.base import Sampling
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.packing import PackedBatch, pack

Answer = dict[str, Tensor]
WITH_KL = LossConfig.preset("grpo", kl_coef=0.04)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do a part of the step."""

    run: Callable[[], Any]
    """Does it once."""
    answer: Callable[[], tuple[Answer, Answer | None]]
    """What came of it, and what that should be (None: what the part's first contender answers)."""
    counted: dict[str, int]
    """The work, counted."""


def _body(world: World, positions: int, per_weight: int = 6) -> int:
    shape = world.scale.shape
    return per_weight * positions * shape.layers * shape.layer_weights


def _head(world: World, tokens: int, products: int) -> int:
    return products * tokens * world.scale.shape.vocabulary * world.scale.shape.hidden


def _update(
    world: World, run: Callable[[], None], model: torch.nn.Module, counted: dict[str, int]
) -> Contender:
    return Contender(run=cleared(model, run), answer=lambda: (_taken_out(model, run), None), counted=counted)


def _taken_out(model: torch.nn.Module, run: Callable[[], None]) -> Answer:
    found = gradients_of(model, run)
    model.zero_grad()
    return found


def _batches(world: World, kept: Sequence[int], *, share: bool) -> list[PackedBatch]:
    """Packed rows of the sequences `kept`, whose `sequence_index` counts within all of them."""
    made = world.made
    batches = pack(
        made.prompts,
        [made.completions[i] for i in kept],
        prompt_of=[made.prompt_of[i] for i in kept],
        token_budget=world.scale.token_budget,
        share_prefix=share,
    )
    index = torch.tensor(list(kept))
    for batch in batches:
        batch.sequence_index.copy_(index[batch.sequence_index])
    return batches


def packed_update(
    world: World,
    *,
    loss: Callable[[Policy], LossOf] = fused_loss,
    head_products: int = 6,
    stores_logits: bool = False,
    share: bool = True,
    skip: bool = True,
) -> Contender:
    """Forward and backward pass over packed rows: with every idea, or without those that are switched off."""
    made, policy = world.made, world.policy
    kept = made.kept if skip else range(len(made.completions))
    batches = _batches(world, kept, share=share)
    run = packed_pass(loss(policy), batches, made.advantages, float(len(made.completions)))
    positions, tokens = positions_of(batches), sum(len(batch.targets) for batch in batches)
    counted = {
        "sequences": len(kept),
        "positions": positions,
        "head_tokens": tokens,
        "matrix_flops": _body(world, positions) + _head(world, tokens, head_products),
        "stored_logits": tokens * world.scale.shape.vocabulary if stores_logits else 0,
    }
    return _update(world, run, policy.model, counted)


def separate_loss(policy: Policy) -> LossOf:
    """Log-probs first, then the loss from them: the vocabulary product is done again in the backward pass."""

    def loss_of(batch: PackedBatch, advantages: Tensor, normalizer: float) -> Tensor:
        logprobs, _ = linear_logprob(policy.hidden_states(batch), _weight(policy), batch.targets)
        return grpo_loss(logprobs, advantages, LOSS, cu_seqlens=batch.cu_seqlens, normalizer=normalizer)[0]

    return loss_of


def eager_loss(policy: Policy) -> LossOf:
    """Logits of all completion tokens in memory, their log-softmax, autograd."""

    def loss_of(batch: PackedBatch, advantages: Tensor, normalizer: float) -> Tensor:
        logits = policy.hidden_states(batch) @ _weight(policy).t()
        logprobs = torch.log_softmax(logits, -1).gather(1, batch.targets[:, None])[:, 0]
        return grpo_loss(logprobs, advantages, LOSS, cu_seqlens=batch.cu_seqlens, normalizer=normalizer)[0]

    return loss_of


def _weight(policy: Policy) -> Tensor:
    head: Any = policy.model.get_output_embeddings()
    return head.weight


def padded_update(world: World, *, by_length: bool) -> Contender:
    """The sequences with signal as rectangles, in the order they come or neighbours in length together."""
    made, model = world.made, world.padded
    kept = list(made.kept)
    if by_length:
        kept.sort(key=lambda i: len(made.prompts[made.prompt_of[i]]) + len(made.completions[i]))
    height = world.scale.padded_rows
    rectangles = [
        rectangle(made.prompts, made.completions, made.prompt_of, kept[first : first + height])
        for first in range(0, len(kept), height)
    ]
    run = padded_pass(model, rectangles, made.advantages, float(len(made.completions)))
    positions = sum(part["ids"].numel() for part in rectangles)
    tokens = sum(len(made.completions[i]) for i in kept)
    counted = {
        "sequences": len(kept),
        "positions": positions,
        "head_tokens": tokens,
        "matrix_flops": _body(world, positions) + _head(world, tokens, 6),
        "stored_logits": 0,
    }
    return _update(world, run, model, counted)


def update_with_reference(world: World) -> Contender:
    """A KL term against a frozen copy: its log-probs are looked up, and no sequence is without signal any more.

    The policy is the reference still, so the term's gradient is zero and the sum's that of the step without it.
    """
    made, policy, reference = world.made, world.policy, world.reference
    batches = _batches(world, range(len(made.completions)), share=True)

    def run() -> None:
        known = [reference.logprobs(batch)[0] for batch in batches]
        for batch, logprobs in zip(batches, known, strict=True):
            loss, _ = policy(
                batch,
                made.advantages[batch.sequence_index],
                WITH_KL,
                ref_logprobs=logprobs,
                normalizer=float(len(made.completions)),
            )
            loss.backward()

    positions, tokens = positions_of(batches), sum(len(batch.targets) for batch in batches)
    counted = {
        "sequences": len(made.completions),
        "positions": 2 * positions,
        "head_tokens": 2 * tokens,
        "matrix_flops": _body(world, positions, 8) + _head(world, tokens, 8),
        "stored_logits": 0,
    }
    return _update(world, run, policy.model, counted)


def optimizer_step(world: World) -> Contender:
    """AdamW on gradients that are there, at a learning rate of zero."""
    parameters = world.policy.trainable_parameters()
    optimizer = Optimizer(parameters, lr=0.0)
    gradients = [torch.full_like(parameter, 1e-3) for parameter in parameters]

    def run() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step(0.0)

    count = sum(parameter.numel() for parameter in parameters)
    return Contender(run=run, answer=lambda: ({}, None), counted={"parameters": count})


def generation(world: World, *, share: bool) -> Contender:
    """Completions of one length by the built-in engine: prompts prefilled once a group, or once a completion."""
    made, scale, engine = world.made, world.scale, world.engine
    asked = made.prompts if share else [made.prompts[p] for p in made.prompt_of]
    sampling = Sampling(max_new_tokens=scale.new_tokens)
    run = partial(engine.generate, asked, scale.group if share else 1, sampling, 0)

    def answer() -> tuple[Answer, Answer]:
        """The engine's log-probs of its own tokens, and the trainer's of the same tokens."""
        completions = run()
        batches = pack(
            made.prompts,
            [completion.token_ids for completion in completions],
            prompt_of=made.prompt_of,
            token_budget=scale.token_budget,
        )
        found = [batch.gather([c.logprobs for c in completions]) for batch in batches]
        wanted = [world.policy.logprobs(batch)[0] for batch in batches]
        return {"logprobs": torch.cat(found)}, {"logprobs": torch.cat(wanted)}

    new = len(made.completions) * scale.new_tokens
    prefilled = sum(map(len, asked))
    positions = prefilled + new - len(made.completions)
    counted = {
        "positions": positions,
        "head_tokens": new,
        "matrix_flops": _body(world, positions, 2) + _head(world, new, 2),
    }
    return Contender(run=run, answer=answer, counted=counted)


def scoring(world: World, *, together: bool = True, share: bool = True) -> Contender:
    """The R rewards of every completion: by one model, or by one model each; prompts read once a group or not."""
    encoded = world.encoded(share=share)
    models = [world.all_heads] if together else world.one_head_each
    budget = world.scale.token_budget

    def run() -> Tensor:  # (S, R)
        return torch.cat([model.predict(encoded, budget).scores for model in models], dim=1)

    batches = models[0].pack(encoded, budget)
    positions = len(models) * positions_of(batches)
    counted = {"positions": positions, "matrix_flops": _body(world, positions, 2)}
    return Contender(run=run, answer=lambda: ({"scores": run()}, None), counted=counted)


def advantages(world: World, mode: Any) -> Contender:
    """From the rewards (S, R) to one advantage a sequence."""
    made = world.made
    run = partial(group_advantages, made.rewards, group_size=world.scale.group, mode=mode)
    return Contender(run=run, answer=lambda: ({}, None), counted={"rewards": made.rewards.numel()})


CONTENDERS: dict[str, Callable[[World], Contender]] = {
    "update": packed_update,
    "update, log-probs then loss": partial(packed_update, loss=separate_loss, head_products=8),
    "update, whole logits": partial(packed_update, loss=eager_loss, stores_logits=True),
    "update, prompts not shared": partial(packed_update, share=False),
    "update, padded as they come": partial(padded_update, by_length=False),
    "update, padded by length": partial(padded_update, by_length=True),
    "update, nothing skipped": partial(packed_update, skip=False),
    "update, with a reference": update_with_reference,
    "generation": partial(generation, share=True),
    "generation, prompts not shared": partial(generation, share=False),
    "scoring": scoring,
    "scoring, prompts not shared": partial(scoring, share=False),
    "scoring, a model a head": partial(scoring, together=False),
    "advantages": partial(advantages, mode="gdpo"),
    "advantages, scalarized": partial(advantages, mode="scalarized"),
    "optimizer": optimizer_step,
}
"""By name; what stands before the comma is the part of the step."""


def compare(contenders: dict[str, Contender], limit: float) -> dict[str, float]:
    """Relative error of every contender's answer, as one vector; AssertionError past `limit`."""
    errors: dict[str, float] = {}
    first: dict[str, Answer] = {}
    for name, contender in contenders.items():
        found, wanted = contender.answer()
        wanted = wanted or first.setdefault(name.partition(",")[0], found)
        assert found.keys() == wanted.keys(), f"{name}: other answers"
        scale = sum(float(x.double().square().sum()) for x in wanted.values())
        off = sum(float((found[key] - x).double().square().sum()) for key, x in wanted.items())
        errors[name] = (off / scale) ** 0.5 if scale else 0.0
        assert errors[name] <= limit, f"{name}: another answer, off by {errors[name]:.1e}"
    return errors
