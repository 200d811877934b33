"""What a loss is given beside log-probs: checked before anything is computed, and on its device.

N tokens, S sequences.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_real, may_read
from .loss_config import LossConfig


def check_config(config: LossConfig) -> None:
    """TypeError for anything but a LossConfig."""
    if not isinstance(config, LossConfig):
        raise TypeError(f"config must be a LossConfig, got {type(config).__name__}")


@dataclass(frozen=True)
class Arguments:
    """What a loss is given beside log-probs and entropy: checked, on their device, without gradient."""

    advantages: Tensor  # (N,) or (S,)
    by_sequence: bool  # which of the two
    old: Tensor | None  # (N,), as are the next two
    ref: Tensor | None
    rollout: Tensor | None
    loss_mask: Tensor | None  # (N,) bool or integer
    cu_seqlens: Tensor | None  # (S+1,) int32 or int64
    divisor: float | Tensor | None  # a tensor is 0-d; None: the number of loss tokens


def check(
    config: LossConfig,
    count: int,
    advantages: Tensor,  # (N,) or (S,)
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: float | Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Arguments:
    """Checks what all losses take, but for its devices, and brings it to the device, float tensors in this dtype.

    Values are read on the CPU; elsewhere, where that would stop the host, with ``GRPO_KERNELS_DEBUG=1``.
    """
    check_config(config)
    if config.kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError(f"kl_coef = {config.kl_coef} needs ref_logprobs; pass them or set kl_coef=0")
    if config.mismatch != "none" and rollout_logprobs is None:
        raise ValueError(f"mismatch = {config.mismatch!r} needs rollout_logprobs")
    if config.needs_sequences and cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens is needed by aggregation={config.aggregation!r}, "
            f"ratio_level={config.ratio_level!r}, surrogate={config.surrogate!r}, "
            f"mismatch={config.mismatch!r}"
        )
    if config.aggregation == "constant" and normalizer is None:
        raise ValueError("aggregation='constant' needs a normalizer, such as the number of sequences")

    def real(value: Tensor) -> Tensor:
        return value.detach().to(device=device, dtype=dtype, non_blocking=True)

    def per_token(name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if value.shape != (count,):
            raise ValueError(f"{name} must have shape (N,) = ({count},), got {tuple(value.shape)}")
        check_real(name, value)
        return real(value)

    sequences = None
    if cu_seqlens is not None:
        if (
            cu_seqlens.ndim != 1
            or cu_seqlens.numel() < 1
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                "cu_seqlens must be int32 or int64 of shape (S+1,), "
                f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        if may_read(cu_seqlens):
            _check_boundaries(cu_seqlens, count, advantages)
        sequences = cu_seqlens.numel() - 1
        cu_seqlens = cu_seqlens.to(device=device, non_blocking=True)

    if loss_mask is not None:
        kind = loss_mask.dtype
        if kind.is_floating_point or kind.is_complex or loss_mask.shape != (count,):
            raise ValueError(
                f"loss_mask must be bool or integer of shape (N,) = ({count},), "
                f"got {loss_mask.dtype} {tuple(loss_mask.shape)}"
            )
        loss_mask = loss_mask.to(device=device, non_blocking=True)

    if advantages.shape not in ((count,), (sequences,)):
        wanted = f"(N,) = ({count},)" + ("" if sequences is None else f" or (S,) = ({sequences},)")
        raise ValueError(f"advantages must have shape {wanted}, got {tuple(advantages.shape)}")
    check_real("advantages", advantages, integers=True)

    divisor = normalizer
    if divisor is None and config.aggregation == "sequence_mean":
        divisor = sequences
    if isinstance(divisor, Tensor):
        if divisor.ndim != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(divisor.shape)}")
        check_real("normalizer", divisor, integers=True)
        if may_read(divisor) and count and not 0 < float(divisor) < math.inf:
            raise ValueError(f"normalizer must be positive and finite, got {float(divisor)}")
        divisor = real(divisor)
    elif divisor is not None and not (0 < divisor < math.inf or (divisor == 0 and count == 0)):
        raise ValueError(f"normalizer must be positive and finite, got {divisor}")

    return Arguments(
        advantages=real(advantages),
        by_sequence=advantages.shape != (count,),
        old=per_token("old_logprobs", old_logprobs),
        ref=per_token("ref_logprobs", ref_logprobs),
        rollout=per_token("rollout_logprobs", rollout_logprobs),
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        divisor=divisor,
    )


def _check_boundaries(cu_seqlens: Tensor, count: int, advantages: Tensor) -> None:
    """Reads the boundaries: they rise from 0 to N, and leave no doubt what as many advantages as tokens are of.

    As many sequences as tokens are of one token each, where by token and by sequence is the same thing, or some
    are empty and others longer, where it is not.
    """
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != count or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to N = {count}, got {_short(cu_seqlens)}")
    if advantages.shape == lengths.shape == (count,) and bool((lengths != 1).any()):
        raise ValueError(
            f"advantages of shape ({count},) may be by token or by sequence: cu_seqlens {_short(cu_seqlens)} has "
            f"as many sequences as tokens, and not of one token each; leave its empty sequences out"
        )


def require_entropy(config: LossConfig, entropy: Tensor | None) -> None:
    """Raises ValueError where the loss needs the entropy and has none."""
    if entropy is None and config.entropy_quantile is not None:
        raise ValueError("entropy_quantile needs the entropy of every token")
    if entropy is None and config.entropy_coef != 0.0:
        raise ValueError(f"entropy_coef = {config.entropy_coef} needs the entropy of every token")


def _short(values: Tensor) -> str:
    listed = values.tolist()
    return str(listed if len(listed) <= 8 else [*listed[:4], "...", *listed[-3:]])
