"""One GRPO update: pack the sequences with signal, add up micro-batch gradients, step the optimizer."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import torch
from grpo_kernels import LossConfig
from torch import Tensor

from grpo_fast.budget import TokenBudget
from grpo_fast.config.resolve import constant_normalizer, loss_config, mismatch_limit
from grpo_fast.config.settings import TrainConfig
from grpo_fast.dumps import Skipped
from grpo_fast.errors import HalfUpdated, UserError
from grpo_fast.models.policy import Policy
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.packing import PackedBatch, pack_chosen
from grpo_fast.parallel.world import World
from grpo_fast.rollout import Rollout
from grpo_fast.typed import floats, integers

EVEN_ROOM = (1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 3.0)
"""Tried in turn: the size of evenly filled micro-batches, so that sequences of all lengths find a place."""


def update(
    policy: Policy,
    optimizer: Optimizer,
    rollout: Rollout,
    config: TrainConfig,
    *,
    lr: float,
    reference: Policy | None = None,
    budget: TokenBudget | None = None,
    on_skip: Callable[[Skipped], None] | None = None,
) -> dict[str, float]:
    """Take `updates_per_rollout` × `minibatches` optimizer steps on one rollout and return the metrics.

    The loss is a sum over micro-batches divided by the normaliser of the whole optimizer step, so the gradient
    does not depend on how `token_budget` splits it. With one optimizer step the old policy is the current one and
    costs no extra pass; with more, its log-probs are computed before the first. `reference` is the frozen copy
    for the KL term (None: the LoRA adapter is switched off instead, or there is no KL term).

    Where a micro-batch does not fit into the device's memory, its optimizer step is redone in smaller ones;
    `budget` remembers that from step to step (None: `optim.token_budget`, and nothing is remembered).

    An optimizer step whose loss or gradient is not finite is not taken; `on_skip` is told of it before anything else
    happens.
    """
    loss = loss_config(config)
    budget = budget or TokenBudget(config.optim.token_budget)
    retries = budget.retries
    several = config.optim.updates_per_rollout * config.optim.minibatches > 1
    known: dict[str, list[Tensor]] = {}
    parts: list[tuple[list[int], Callable[[int], list[PackedBatch]], float]] = []
    for sequences in split_by_prompt(rollout, config.optim.minibatches):
        kept = with_signal(rollout, sequences, loss, mask_truncated=config.loss.mask_truncated)
        batches_of = cache(partial(packed, rollout, kept, policy))  # every pass reads the same batches
        if kept and (several or loss.kl_coef != 0):
            look_up = partial(look_up_logprobs, known, policy, reference, loss, config, old=several)
            budget.run(batches_of, look_up)
        parts.append((kept, batches_of, step_normalizer(rollout, sequences, loss, config)))

    known["rollout_logprobs"] = [completion.logprobs for completion in rollout.completions]
    losses: list[Tensor] = []
    batch_metrics: list[dict[str, Tensor]] = []
    norms: list[float] = []
    skipped = 0
    policy.train()
    for _ in range(config.optim.updates_per_rollout):
        for kept, batches_of, normalizer in parts:
            if not kept:
                continue
            add_up = partial(
                add_up_gradients, policy, rollout.advantages, known, loss, config, normalizer=normalizer
            )
            try:
                own = budget.run(batches_of, add_up, undo=optimizer.discard)
                step_losses, step_metrics = pooled(policy.world, batches_of(budget.tokens), *own)
                check_mismatch(step_metrics, mismatch_limit(config), ahead=config.rollout.ahead)
            except (UserError, torch.OutOfMemoryError) as error:
                if norms:
                    raise HalfUpdated(str(error)) from error
                raise
            losses += step_losses
            batch_metrics += step_metrics
            try:
                norm, taken = optimizer.step(lr, loss=torch.stack(step_losses).sum())
            except torch.OutOfMemoryError as error:
                raise HalfUpdated(
                    "out of memory in the optimizer's step: keep its states elsewhere (memory.optimizer host) or make "
                    "them smaller (optim.optimizer adamw8bit or adafactor, policy.lora_rank)"
                ) from error
            norms.append(norm)
            skipped += not taken
            if not taken and on_skip is not None:
                on_skip(
                    Skipped(
                        rollout=rollout,
                        kept=kept,
                        known=known,
                        normalizer=normalizer,
                        token_budget=budget.tokens,
                        losses=step_losses,
                        norm=norm,
                        nonfinite=optimizer.nonfinite,
                        lr=lr,
                    )
                )
    return {
        "lr": lr,
        "skipped_sequences": len(rollout.completions) - sum(len(kept) for kept, *_ in parts),
        "skipped_updates": skipped,
        "oom_retries": budget.retries - retries,
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        **token_weighted(losses, batch_metrics),
        **(policy.compiled.metrics() if policy.compiled is not None else {}),
    }


def add_up_gradients(
    policy: Policy,
    advantages: Tensor,  # (S,)
    known: dict[str, list[Tensor]],  # log-probs of each of the S sequences
    loss: LossConfig,
    config: TrainConfig,
    batches: list[PackedBatch],
    *,
    normalizer: float,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Forward and backward of every micro-batch of one optimizer step; the losses and metrics of each.

    On several processes losses are `world.size` times as large, since gradients become the processes' mean.
    """
    advantages = advantages.to(policy.device)
    losses: list[Tensor] = []
    batch_metrics: list[dict[str, Tensor]] = []
    for place, batch in enumerate(batches, start=1):
        policy.sums_gradients(place == len(batches) or config.parallel.reduce == "micro_batch")
        step_loss, metrics = policy(
            batch,
            advantages[batch.sequence_index],
            loss,
            normalizer=normalizer / policy.world.size,
            loss_mask=None if batch.counts else torch.zeros_like(batch.targets, dtype=torch.bool),
            temperature=config.rollout.temperature,
            backend=config.policy.backend,
            **{name: batch.gather(logprobs) for name, logprobs in known.items()},
        )
        step_loss.backward()
        losses.append(step_loss.detach())
        batch_metrics.append(metrics)
    return losses, batch_metrics


def split_by_prompt(rollout: Rollout, minibatches: int) -> list[list[int]]:
    """Sequence indices of each minibatch: whole groups, as evenly as the number of prompts allows."""
    bounds = [len(rollout.prompts) * part // minibatches for part in range(minibatches + 1)]
    return [
        [i for i, prompt in enumerate(rollout.prompt_of) if low <= prompt < high]
        for low, high in pairwise(bounds)
        if high > low
    ]


def with_signal(
    rollout: Rollout, sequences: list[int], loss: LossConfig, *, mask_truncated: bool
) -> list[int]:
    """The sequences whose gradient can differ from zero: the others never reach the transformer.

    A zero advantage leaves only the KL and entropy terms. With `mask_truncated` a completion that was cut off at
    the length limit teaches nothing, but still counts in the normaliser.
    """
    always = loss.kl_coef != 0 or loss.entropy_coef != 0
    advantages = floats(rollout.advantages)
    return [
        i
        for i in sequences
        if (always or advantages[i] != 0)
        and not (mask_truncated and rollout.completions[i].finish_reason == "length")
    ]


def packed(rollout: Rollout, kept: list[int], policy: Policy, token_budget: int) -> list[PackedBatch]:
    """This process's micro-batches of the sequences `kept`; `sequence_index` counts within the whole rollout."""
    pack_to = partial(
        pack_chosen,
        rollout.prompt_ids,
        [completion.token_ids for completion in rollout.completions],
        kept,
        prompt_of=rollout.prompt_of,
        share_prefix=policy.packed,
    )
    batches = dealt(lambda budget: pack_to(token_budget=budget), token_budget, policy.world)
    return [batch.to(policy.device) for batch in batches]


def dealt(pack_to: Callable[[int], list[PackedBatch]], token_budget: int, world: World) -> list[PackedBatch]:
    """This process's share of the micro-batches, as many as every other's; processes work on similar sizes at once.

    Where the number of micro-batches is no multiple of the processes', they are made smaller, so that nobody waits for
    a full one; what is still missing is a micro-batch that does not count.
    """
    batches = pack_to(token_budget)
    if world.size == 1:
        return batches
    rounds = -(-len(batches) // world.size)
    places = rounds * world.size
    if len(batches) < places:
        even = sum(map(tokens_of, batches)) / places
        for room in EVEN_ROOM:
            smaller = pack_to(max(1, min(token_budget, round(room * even))))
            if len(smaller) <= places:
                batches = smaller
                break
    batches = sorted(batches, key=tokens_of, reverse=True)
    own = batches[world.rank :: world.size]
    return own + [replace(batches[-1], counts=False)] * (rounds - len(own))


def tokens_of(batch: PackedBatch) -> int:
    """Positions of a micro-batch."""
    return batch.input_ids.shape[1]


def pooled(
    world: World, batches: list[PackedBatch], losses: list[Tensor], metrics: list[dict[str, Tensor]]
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Losses and metrics of every process's micro-batches, on every process; alone they stay where they are."""
    if world.size == 1:
        return losses, metrics
    names = list(metrics[0])
    rows = [
        torch.stack([loss / world.size, *(values[name].to(loss.dtype) for name in names)])
        for batch, loss, values in zip(batches, losses, metrics, strict=True)
        if batch.counts
    ]
    table = world.gather_rows(torch.stack(rows) if rows else torch.empty(0, 1 + len(names)))
    return list(table[:, 0]), [dict(zip(names, row, strict=True)) for row in table[:, 1:]]


def step_normalizer(rollout: Rollout, sequences: list[int], loss: LossConfig, config: TrainConfig) -> float:
    """What the summed loss of one optimizer step is divided by, sequences without signal included."""
    if loss.aggregation == "token_mean":
        return float(sum(len(rollout.completions[i].token_ids) for i in sequences))
    return (
        constant_normalizer(config, len(sequences))
        if loss.aggregation == "constant"
        else float(len(sequences))
    )


def look_up_logprobs(
    known: dict[str, list[Tensor]],
    policy: Policy,
    reference: Policy | None,
    loss: LossConfig,
    config: TrainConfig,
    batches: list[PackedBatch],
    *,
    old: bool,
) -> None:
    """Put into `known` the log-probs (float32) of the old and of the reference policy, where the loss needs them.

    One tensor a sequence of the rollout, so that they serve however the sequences are packed later.
    """
    temperature = config.rollout.temperature
    scorer = policy if reference is None else reference
    for batch in batches:
        found: dict[str, Tensor] = {}
        if old:
            found["old_logprobs"] = policy.logprobs(batch, temperature=temperature)[0]
        if loss.kl_coef != 0:
            found["ref_logprobs"] = scorer.logprobs(
                batch, temperature=temperature, reference=reference is None
            )[0]
        indices, lengths = integers(batch.sequence_index), integers(batch.cu_seqlens.diff())
        for name, logprobs in found.items():
            rows = known.setdefault(name, [])
            for index, values in zip(indices, torch.split(logprobs, lengths), strict=True):
                rows.extend([values[:0]] * (index + 1 - len(rows)))
                rows[index] = values


def check_mismatch(batches: list[dict[str, Tensor]], limit: float, *, ahead: bool = False) -> None:
    """UserError where the engine's log-probs are further from the trainer's than `limit` (0: any distance goes).

    Measured by the k3 estimate of KL(engine, trainer) over the tokens of the micro-batches `batches`; asked before
    the optimizer steps, so that no weight moves by what cannot be right.
    """
    if not limit:
        return
    table = torch.stack(
        [
            torch.stack([batch[name].double() for name in ("tokens", "mismatch_k3", "mismatch_mean")])
            for batch in batches
        ]
    )
    divergence, gap = floats((table[:, 0] @ table[:, 1:]) / table[:, 0].sum().clamp(min=1))
    if divergence > limit:
        older = (
            "With rollout.ahead one update lies between the two: a lower optim.lr brings them nearer. "
            * ahead
        )
        raise UserError(
            f"the engine's log-probs differ from the trainer's: KL divergence {divergence:.3g}, over the limit of "
            f"{limit:g} (engine.max_mismatch), {gap:.3g} a token on average. {older}See that the engine has the same "
            "weights, dtype and sampling, raise the limit, or begin a new run that corrects for it (loss.mismatch)",
            agreed=True,
        )


def token_weighted(losses: list[Tensor], batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of a step from those of its micro-batches: maxima of `*_max`, token-weighted means of the rest."""
    if not batches:
        return {"loss": 0.0, "trained_tokens": 0.0}
    names = [name for name in batches[0] if name not in ("tokens", "invalid_targets")]
    rows = [torch.stack([batch[name].float() for name in ["tokens", *names]]) for batch in batches]
    table = torch.stack(rows).cpu().double()  # (micro-batches, 1 + metrics): the step's one synchronisation
    tokens = table[:, 0]
    result = {"loss": torch.stack(losses).sum().item(), "trained_tokens": tokens.sum().item()}
    for column, name in enumerate(names, start=1):
        values = table[:, column]
        mean = (values * tokens).sum() / tokens.sum().clamp(min=1)
        result[name] = (values.max() if name.endswith("_max") else mean).item()
    if "mismatch_square" in result:
        # Effective sample size: (Σw)² / Σw² over the number of tokens, w = exp(trainer - engine)
        mean_weight = 1 + result["mismatch_k3"] - result["mismatch_k1"]
        result["mismatch_ess"] = mean_weight**2 / result.pop("mismatch_square")
    return result
