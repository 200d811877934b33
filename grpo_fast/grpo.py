"""One GRPO update: pack the sequences with signal, add up micro-batch gradients, step the optimizer."""

from dataclasses import replace
from itertools import pairwise

import torch
from grpo_kernels import LossConfig
from torch import Tensor

from grpo_fast.config.resolve import constant_normalizer, loss_config
from grpo_fast.config.settings import TrainConfig
from grpo_fast.models.policy import Policy
from grpo_fast.optim import Optimizer
from grpo_fast.packing import PackedBatch, pack
from grpo_fast.rollout import Rollout


def update(
    policy: Policy,
    optimizer: Optimizer,
    rollout: Rollout,
    config: TrainConfig,
    *,
    lr: float,
    reference: Policy | None = None,
) -> dict[str, float]:
    """Take `updates_per_rollout` × `minibatches` optimizer steps on one rollout and return the metrics.

    The loss is a sum over micro-batches divided by the normaliser of the whole optimizer step, so the gradient
    does not depend on how `token_budget` splits it. With one optimizer step the old policy is the current one and
    costs no extra pass; with more, its log-probs are computed before the first. `reference` is the frozen copy
    for the KL term (None: the LoRA adapter is switched off instead, or there is no KL term).
    """
    loss = loss_config(config)
    several = config.optim.updates_per_rollout * config.optim.minibatches > 1
    parts = []
    for sequences in split_by_prompt(rollout, config.optim.minibatches):
        kept = with_signal(rollout, sequences, loss, mask_truncated=config.loss.mask_truncated)
        batches = packed(rollout, kept, config.optim.token_budget, policy.device)
        known = [known_logprobs(policy, reference, batch, loss, config, old=several) for batch in batches]
        parts.append(
            (list(zip(batches, known, strict=True)), step_normalizer(rollout, sequences, loss, config))
        )

    advantages = rollout.advantages.to(policy.device)
    sampled_logprobs = [completion.logprobs for completion in rollout.completions]
    losses: list[Tensor] = []
    batch_metrics: list[dict[str, Tensor]] = []
    norms: list[float] = []
    skipped = 0
    policy.train()
    for _ in range(config.optim.updates_per_rollout):
        for batches, normalizer in parts:
            if not batches:
                continue
            for batch, known in batches:
                step_loss, metrics = policy(
                    batch,
                    advantages[batch.sequence_index],
                    loss,
                    rollout_logprobs=batch.gather(sampled_logprobs).to(policy.device),
                    normalizer=normalizer,
                    temperature=config.rollout.temperature,
                    backend=config.policy.backend,
                    **known,
                )
                step_loss.backward()
                losses.append(step_loss.detach())
                batch_metrics.append(metrics)
            norm, taken = optimizer.step(lr)
            norms.append(norm)
            skipped += not taken
    trained = sum(len(batch.sequence_index) for batches, _ in parts for batch, _ in batches)
    return {
        "lr": lr,
        "skipped_sequences": len(rollout.completions) - trained,
        "skipped_updates": skipped,
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        **token_weighted(losses, batch_metrics),
        **(policy.compiled.metrics() if policy.compiled is not None else {}),
    }


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
    advantages = rollout.advantages.tolist()
    return [
        i
        for i in sequences
        if (always or advantages[i] != 0)
        and not (mask_truncated and rollout.completions[i].finish_reason == "length")
    ]


def packed(rollout: Rollout, kept: list[int], token_budget: int, device: torch.device) -> list[PackedBatch]:
    """Micro-batches of the sequences `kept`; their `sequence_index` counts within the whole rollout."""
    if not kept:
        return []
    batches = pack(
        rollout.prompt_ids,
        [rollout.completions[i].token_ids for i in kept],
        prompt_of=[rollout.prompt_of[i] for i in kept],
        token_budget=token_budget,
    )
    positions = torch.tensor(kept)
    return [replace(batch, sequence_index=positions[batch.sequence_index]).to(device) for batch in batches]


def step_normalizer(rollout: Rollout, sequences: list[int], loss: LossConfig, config: TrainConfig) -> float:
    """What the summed loss of one optimizer step is divided by, sequences without signal included."""
    if loss.aggregation == "token_mean":
        return float(sum(len(rollout.completions[i].token_ids) for i in sequences))
    return (
        constant_normalizer(config, len(sequences))
        if loss.aggregation == "constant"
        else float(len(sequences))
    )


def known_logprobs(
    policy: Policy,
    reference: Policy | None,
    batch: PackedBatch,
    loss: LossConfig,
    config: TrainConfig,
    *,
    old: bool,
) -> dict[str, Tensor]:
    """Log-probs (N,) float32 of the old and of the reference policy, where the loss needs them."""
    known: dict[str, Tensor] = {}
    temperature = config.rollout.temperature
    if old:
        known["old_logprobs"] = policy.logprobs(batch, temperature=temperature)[0]
    if loss.kl_coef != 0:
        scorer = policy if reference is None else reference
        known["ref_logprobs"] = scorer.logprobs(batch, temperature=temperature, reference=reference is None)[
            0
        ]
    return known


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
    return result
