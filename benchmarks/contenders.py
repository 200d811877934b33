"""Ways to compute the loss head's loss and gradients, each a function without arguments after set-up.

N tokens, H hidden size, V vocabulary. A contender is built from a Problem and a mode: "trained" (gradients of
hidden and weight), "frozen" (of hidden only), "forward" (log-probs only).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from grpo_kernels import LossConfig, linear_grpo_loss, linear_logprob, reference
from torch import Tensor

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
CONFIG = LossConfig.preset("dapo", clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
Run = Callable[[], tuple[Tensor, ...]]  # (loss or log-probs, dX, dW), as many as the mode has


@dataclass(frozen=True)
class Problem:
    """One step's loss head: logits of spread 3 and targets sampled from them, as a policy's are."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    advantages: Tensor  # (N,) float32
    old_logprobs: Tensor  # (N,) float32
    sequences: int

    @classmethod
    def random(
        cls, tokens: int, width: int, vocabulary: int, *, sequences: int, dtype: torch.dtype, device: str
    ) -> "Problem":
        """The same numbers in every process that asks with the same arguments."""
        random = torch.Generator(device).manual_seed(0)
        draw = {"generator": random, "device": device}
        hidden = torch.randn(tokens, width, **draw).to(dtype)
        weight = (torch.randn(vocabulary, width, **draw) * (3.0 / width**0.5)).to(dtype)
        targets, logprobs = [], []
        for rows in hidden.split(256):
            chances = torch.log_softmax(rows.float() @ weight.float().t(), -1)
            picked = torch.multinomial(chances.exp(), 1, generator=random)
            targets.append(picked.squeeze(1))
            logprobs.append(chances.gather(1, picked).squeeze(1))
        old = torch.cat(logprobs) + 0.15 * torch.randn(tokens, **draw)
        advantages = torch.randn(sequences, **draw).repeat_interleave(tokens // sequences)
        return cls(hidden, weight, torch.cat(targets), advantages, old, sequences)


def _leaves(problem: Problem, mode: str) -> tuple[Tensor, Tensor]:
    hidden = problem.hidden.detach().requires_grad_(mode != "forward")
    return hidden, problem.weight.detach().requires_grad_(mode == "trained")


def _with_gradients(problem: Problem, mode: str, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Run:
    hidden, weight = _leaves(problem, mode)
    wanted = [leaf for leaf in (hidden, weight) if leaf.requires_grad]

    def run() -> tuple[Tensor, ...]:
        if not wanted:
            with torch.no_grad():
                return (loss_of(hidden, weight),)
        loss = loss_of(hidden, weight)
        return (loss.detach(), *torch.autograd.grad(loss, wanted))

    return run


def products(problem: Problem, mode: str) -> Run:
    """The bare matrix products on preallocated memory: a floor for whatever computes the gradients."""
    hidden, weight = problem.hidden, problem.weight
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.t(), out=logits)
        if mode != "forward":
            torch.mm(logits, weight, out=d_hidden)
        if mode == "trained":
            torch.mm(logits.t(), hidden, out=d_weight)
        return ()

    return run


def ours(backend: str) -> Callable[[Problem, str], Run]:
    """This package, on one backend."""

    def build(problem: Problem, mode: str) -> Run:
        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            if mode == "forward":
                return linear_logprob(hidden, weight, problem.targets, backend=backend)[0]
            return linear_grpo_loss(
                hidden,
                weight,
                problem.targets,
                problem.advantages,
                CONFIG,
                old_logprobs=problem.old_logprobs,
                backend=backend,
            )[0]

        return _with_gradients(problem, mode, loss_of)

    return build


def eager(problem: Problem, mode: str) -> Run:
    """Logits in memory, logsumexp and gather, autograd: the usual way, at its thriftiest."""

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        chosen = logits.gather(1, problem.targets.unsqueeze(1)).squeeze(1)
        logprobs = chosen.float() - torch.logsumexp(logits, -1).float()
        if mode == "forward":
            return logprobs
        ratio = torch.exp(logprobs - problem.old_logprobs)
        bounded = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        return -torch.minimum(ratio * problem.advantages, bounded * problem.advantages).mean()

    return _with_gradients(problem, mode, loss_of)


def compiled(problem: Problem, mode: str) -> Run:
    """The eager contender under torch.compile."""
    plain = eager(problem, mode)
    return torch.compile(plain)


def liger(compile_it: bool) -> Callable[[Problem, str], Run]:
    """Liger's fused linear GRPO loss, chunked over sequences as by its default."""

    def build(problem: Problem, mode: str) -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        if mode == "forward":
            raise ValueError("liger gives no log-probs")
        shape = (problem.sequences, -1)
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=compile_it,
            use_ref_model=False,
            epsilon_low=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            loss_type="dapo",
        )
        targets = problem.targets.view(shape)
        old = problem.old_logprobs.view(shape)
        mask = torch.ones_like(targets)
        advantages = problem.advantages.view(shape)[:, 0]

        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            rows = hidden.view(problem.sequences, -1, hidden.shape[1])
            return loss(rows, weight, targets, mask, advantages, old_per_token_logps=old)[0]

        return _with_gradients(problem, mode, loss_of)

    return build


def liger_cross_entropy(problem: Problem, mode: str) -> Run:
    """Liger's fused linear cross entropy: a simpler loss over the same head, compared with PyTorch's own."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if mode == "forward":
        raise ValueError("liger_cross_entropy gives no log-probs")

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return entropy(hidden, weight, problem.targets)

    entropy: Callable[..., Any] = liger_fused_linear_cross_entropy
    rows = slice(0, 256)
    found = entropy(problem.hidden[rows], problem.weight, problem.targets[rows])
    logits = problem.hidden[rows].double() @ problem.weight.double().t()
    wanted = F.cross_entropy(logits, problem.targets[rows])
    if not torch.allclose(found.double(), wanted, rtol=2e-2):
        raise ValueError(f"loss {found.item():.4f}, PyTorch's {wanted.item():.4f}")
    run = _with_gradients(problem, mode, loss_of)

    def timed() -> tuple[Tensor, ...]:
        run()
        return ()  # another loss: nothing to hold against this benchmark's float64

    return timed


def truth(problem: Problem, mode: str) -> tuple[Tensor, ...]:
    """Loss and gradients in float64, by the reference, 128 tokens at a time."""
    hidden = problem.hidden.double().requires_grad_(mode != "forward")
    weight = problem.weight.double().requires_grad_(mode == "trained")
    parts = []
    for start in range(0, len(hidden), 128):
        rows = slice(start, start + 128)
        if mode == "forward":
            parts.append(reference.linear_logprob(hidden[rows], weight, problem.targets[rows])[0])
            continue
        loss, _ = reference.linear_grpo_loss(
            hidden[rows],
            weight,
            problem.targets[rows],
            problem.advantages[rows].double(),
            CONFIG,
            old_logprobs=problem.old_logprobs[rows].double(),
            normalizer=float(len(hidden)),
        )
        loss.backward()
        parts.append(loss.detach())
    if mode == "forward":
        return (torch.cat(parts),)
    gradients = [leaf.grad for leaf in (hidden, weight) if leaf.grad is not None]
    return (torch.stack(parts).sum(), *gradients)


CONTENDERS: dict[str, Callable[[Problem, str], Run]] = {
    "products": products,
    "torch": ours("torch"),
    "triton": ours("triton"),
    "fused": ours("fused"),
    "eager": eager,
    "compiled": compiled,
    "liger": liger(False),
    "liger_compiled": liger(True),
    "liger_cross_entropy": liger_cross_entropy,
}
