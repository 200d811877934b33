"""One fixed batch through every contender: the same loss and the same gradients, or nothing is timed.

The truth is float64, by the plain loss. Completions have all lengths, the old policy is another one, so that masks,
normalisers and clipping take part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from grpo_kernels import LossConfig
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.step.contenders import padded_loss
from grpo_fast.models.policy import Policy
from grpo_fast.packing import pack

LIMIT = 1e-5
"""Largest relative deviation from float64, of the loss and of all gradients as one vector (float32)."""


@dataclass(frozen=True)
class Fixed:
    """S completions of mixed lengths to P prompts of one length, group after group."""

    prompts: list[list[int]]
    completions: list[list[int]]
    prompt_of: list[int]
    advantages: Tensor  # (S,)
    old_logprobs: list[Tensor]  # S of (C,)

    @property
    def rows(self) -> Tensor:
        """(S, T) prompts and completions, padded on the right with token 0."""
        longest = max(map(len, self.completions))
        rows = [
            [*self.prompts[p], *ids, *[0] * (longest - len(ids))]
            for p, ids in zip(self.prompt_of, self.completions, strict=True)
        ]
        return torch.tensor(rows)

    @property
    def mask(self) -> Tensor:
        """(S, C) 1 for a token of a completion, 0 for padding."""
        lengths = torch.tensor([len(ids) for ids in self.completions])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).long()

    @property
    def padded_old(self) -> Tensor:
        """(S, C)"""
        return torch.nn.utils.rnn.pad_sequence(self.old_logprobs, batch_first=True)


@torch.no_grad()
def fixed_batch(
    model: PreTrainedModel, *, prompts: int = 4, group: int = 4, width: int = 24, seed: int = 0
) -> Fixed:
    """Random tokens; old log-probs are the model's own, moved by a tenth."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size - 2

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    asked = [tokens(width) for _ in range(prompts)]
    lengths = torch.randint(3, width + 1, (prompts * group,), generator=draw).tolist()
    replies = [tokens(length) for length in lengths]
    owner = [p for p in range(prompts) for _ in range(group)]
    old = []
    for p, ids in zip(owner, replies, strict=True):
        logits = model(input_ids=torch.tensor([asked[p] + ids]), use_cache=False).logits[
            0, -len(ids) - 1 : -1
        ]
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        old.append(logprobs + 0.1 * torch.randn(len(ids), generator=draw))
    advantages = torch.randn(len(owner), generator=draw)
    return Fixed(asked, replies, owner, advantages, old)


def save_for_trl(fixed: Fixed, path: Path) -> None:
    """The batch in the form of TRL's own loss function."""
    width = len(fixed.prompts[0])
    rows, mask = fixed.rows, fixed.mask
    batch = {
        "prompt_ids": rows[:, :width],
        "prompt_mask": torch.ones_like(rows[:, :width]),
        "completion_ids": rows[:, width:],
        "completion_mask": mask,
        "advantages": fixed.advantages,
        "old_per_token_logps": fixed.padded_old,
        "num_items_in_batch": mask.sum(),
    }
    torch.save(batch, path)


def through_policy(policy: Policy, fixed: Fixed, *, token_budget: int, share_prefix: bool) -> float:
    """Our packed forward, loss head and backward; the gradients stay in the model."""
    config = LossConfig.preset("grpo", kl_coef=0.0)
    batches = pack(
        fixed.prompts,
        fixed.completions,
        prompt_of=fixed.prompt_of,
        token_budget=token_budget,
        share_prefix=share_prefix,
    )
    total = 0.0
    for batch in batches:
        loss, _ = policy(
            batch,
            fixed.advantages[batch.sequence_index],
            config,
            old_logprobs=batch.gather(fixed.old_logprobs),
            normalizer=float(len(fixed.completions)),
        )
        loss.backward()
        total += loss.item()
    return total


def through_logits(model: PreTrainedModel, fixed: Fixed) -> float:
    """The plain contender's padded forward and backward."""
    width = len(fixed.prompts[0])
    dtype = next(model.parameters()).dtype
    loss = padded_loss(
        model,
        fixed.rows,
        fixed.rows[:, width:],
        fixed.advantages.to(dtype),
        fixed.mask,
        fixed.padded_old.to(dtype),
    )
    loss.backward()
    return loss.item()


def compare(
    policy: Policy,
    model: PreTrainedModel,
    fixed: Fixed,
    trl: tuple[float, Mapping[str, Tensor]] | None = None,
) -> dict[str, dict[str, float]]:
    """Relative errors of each contender's loss and gradients against float64; AssertionError past `LIMIT`."""
    exact = copy.deepcopy(model).double()
    true_loss = through_logits(exact, fixed)
    truth = _gradients(exact)
    runs: dict[str, tuple[PreTrainedModel, Callable[[], float]]] = {
        "padded, whole logits": (model, lambda: through_logits(model, fixed)),
    }
    for budget in (8192, 100):
        for share in (True, False):
            name = f"packed to {budget}{', prompts shared' if share else ''}"
            runs[name] = (
                policy.model,
                lambda budget=budget, share=share: through_policy(
                    policy, fixed, token_budget=budget, share_prefix=share
                ),
            )
    found = {name: (run(), _gradients(owner)) for name, (owner, run) in runs.items()}
    if trl is not None:
        found["TRL"] = trl[0], dict(trl[1])
    errors = {}
    for name, (loss, gradients) in found.items():
        scale = sum(g.square().sum().item() for g in truth.values())
        off = sum((gradients[key].double() - g).square().sum().item() for key, g in truth.items())
        errors[name] = {"loss": abs(loss - true_loss) / abs(true_loss), "gradient": (off / scale) ** 0.5}
        assert max(errors[name].values()) <= LIMIT, f"{name} differs from float64: {errors[name]}"
    return errors


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients by name, taken out of the model."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name], parameter.grad = parameter.grad, None
    return found
