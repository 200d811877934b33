"""The loss on a GPU: ``_token_loss.evaluate`` by the kernels of ``_loss_kernels``.

N tokens, S sequences, Q programs.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ._loss_arguments import Arguments, require_entropy
from ._loss_kernels import combine_partials, require_gpu, token_losses
from ._token_loss import TokenLoss, Tokens, top_entropy
from .loss_config import LossConfig

ELEMENTS = 2  # a thread's share of a block: at most some 90 registers, with every row of the table at work
BLOCK = 512  # tokens at once where the programs share them equally
SHORTEST_BLOCK, LONGEST_BLOCK = 128, 1024  # and where sequences of all lengths come
PROGRAMS = 4096  # at most so many equal shares: several for each multiprocessor, few for the second launch

ROWS = 16  # of the sums, the first being the loss
METRICS = {
    "clip_low_frac": 2,
    "clip_high_frac": 3,
    "ratio_mean": 4,
    "clamped_frac": 5,
    "dropped_frac": 6,
    "kl": 7,
    "entropy": 8,
    "mismatch_weight": 9,
    "mismatch_mean": 10,
    "mismatch_k1": 11,
    "mismatch_k3": 12,
    "mismatch_square": 13,
    "ratio_max": 14,
    "mismatch_max": 15,
}
MISMATCH = ("mismatch_mean", "mismatch_k1", "mismatch_k3", "mismatch_square", "mismatch_max")


def evaluate(
    config: LossConfig, tokens: Tokens, logprobs: Tensor, entropy: Tensor | None, *, measure: bool = True
) -> TokenLoss:
    """``_token_loss.evaluate``, for float32 tensors on a GPU (or in the interpreter)."""
    arguments = Arguments(
        advantages=tokens.advantages,
        by_sequence=False,
        old=tokens.old,
        ref=tokens.ref,
        rollout=tokens.rollout,
        loss_mask=tokens.active,
        cu_seqlens=tokens.cu_seqlens,
        divisor=1.0,
    )
    return _launch(config, arguments, tokens.weights, logprobs, entropy, measure)


def evaluate_whole(
    config: LossConfig, arguments: Arguments, logprobs: Tensor, entropy: Tensor | None
) -> TokenLoss:
    """The same straight from the arguments; the loss is that of all tokens, 0-d."""
    return _launch(config, arguments, None, logprobs, entropy, True)


def _launch(
    config: LossConfig,
    arguments: Arguments,
    weights: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    measure: bool,
) -> TokenLoss:
    """Both launches, or without metrics only the first. Given the weights, the loss is per token, else 0-d."""
    require_entropy(config, entropy)
    device, count = logprobs.device, logprobs.shape[0]
    require_gpu(device)
    mask, top, divisor = arguments.loss_mask, None, arguments.divisor
    if config.entropy_quantile is not None:
        assert entropy is not None
        active = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask != 0
        top = top_entropy(entropy.detach(), active, config.entropy_quantile).view(torch.uint8)
    if mask is not None:
        mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).contiguous()
    if divisor is None:
        divisor = max(count, 1) if mask is None else mask.count_nonzero().clamp_(min=1)

    own_weights = weights is None and config.aggregation == "sequence_mean"
    by_sequence = arguments.by_sequence or own_weights or config.couples_sequences
    if by_sequence:
        assert arguments.cu_seqlens is not None
        programs = arguments.cu_seqlens.numel() - 1
        mean_length = triton.next_power_of_2(max(1, count // max(1, programs)))
        block, share = min(max(mean_length, SHORTEST_BLOCK), LONGEST_BLOCK), 0
    else:
        block, share = BLOCK, BLOCK * max(1, -(-count // (BLOCK * PROGRAMS)))
        programs = -(-count // share)

    real: dict[str, Any] = {"dtype": torch.float32, "device": device}
    losses = None if weights is None else torch.empty(count, **real)
    by_logprob = torch.empty(count, **real)
    by_entropy = torch.empty(count, **real) if config.entropy_coef != 0.0 else None
    partials = torch.empty(ROWS, programs, **real) if measure else None

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().float().contiguous()

    if programs:
        token_losses[(programs,)](
            flat(logprobs),
            flat(arguments.advantages),
            flat(arguments.old),
            flat(arguments.ref),
            flat(arguments.rollout),
            flat(entropy),
            top,
            mask,
            flat(weights),
            arguments.cu_seqlens.contiguous() if by_sequence and arguments.cu_seqlens is not None else None,
            divisor if isinstance(divisor, Tensor) else None,
            1.0 if isinstance(divisor, Tensor) else float(divisor),
            float(config.kl_coef),
            float(config.entropy_coef),
            losses,
            by_logprob,
            by_entropy,
            partials,
            count,
            share,
            # the two coefficients may change from step to step: no reason to compile again
            CONFIG=replace(
                config, kl_coef=float(config.kl_coef != 0.0), entropy_coef=float(config.entropy_coef != 0.0)
            ),
            SEQUENCES=by_sequence,
            BY_SEQUENCE=arguments.by_sequence,
            SKIP_ZERO=config.skips_zero_advantage(arguments.by_sequence),
            SUMS=own_weights or config.couples_sequences,
            SHARED_SLOPE=config.ratio_level == "sequence" and config.surrogate in ("clip", "sapo"),
            BLOCK=block,
            num_warps=max(1, block // (32 * ELEMENTS)),
        )
    if partials is None:
        assert losses is not None
        return TokenLoss(losses, by_logprob, by_entropy, {})
    found = torch.empty(ROWS, **real)
    number = torch.empty(1, dtype=torch.int64, device=device)
    combine_partials[(ROWS,)](partials, found, number, programs, BLOCK=1024, num_warps=4)
    present = {
        "kl": arguments.ref is not None,
        "entropy": entropy is not None,
        "mismatch_weight": config.mismatch != "none",
    }
    present |= dict.fromkeys(MISMATCH, arguments.rollout is not None)
    metrics = {"tokens": number[0]}
    metrics |= {name: found[row] for name, row in METRICS.items() if present.get(name, True)}
    return TokenLoss(found[0] if losses is None else losses, by_logprob, by_entropy, metrics)
