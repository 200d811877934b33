"""pytest-benchmark suite of the kernels at a size for every machine: `pytest benchmarks --benchmark-only`."""

import pytest
import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss

from benchmarks.contenders import CONTENDERS, Problem, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPE = (8192, 1536, 151936) if DEVICE == "cuda" else (256, 128, 20000)


@pytest.fixture(scope="module")
def problem() -> Problem:
    tokens, width, vocabulary = SHAPE
    return Problem.random(tokens, width, vocabulary, sequences=8, dtype=DTYPE, device=DEVICE)


def _synchronised(run):
    def timed():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return timed


NAMES = ("products", "triton", "fused", "torch", "eager", "compiled", "liger", "liger_cross_entropy")
ELSEWHERE = ("triton", "fused") if DEVICE == "cpu" else ("torch",)


@pytest.mark.parametrize("mode", ["trained", "frozen", "forward"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_loss_head(benchmark, problem, name, mode):
    try:
        run = CONTENDERS[name](problem, mode)
        found = run()
    except (ImportError, ValueError) as error:  # not installed, or it has no such mode
        pytest.skip(str(error))
    for ours, true in zip(
        found, truth(problem, mode), strict=False
    ):  # agreement first; products give nothing
        assert (ours.double() - true).abs().max() <= 5e-2 * true.abs().max()
    benchmark(_synchronised(run))


def test_grpo_loss(benchmark):
    tokens = 1 << 20 if DEVICE == "cuda" else 1 << 16
    logprobs = (-torch.rand(tokens, device=DEVICE)).requires_grad_()
    old, advantages = logprobs.detach() + 0.1, torch.randn(tokens, device=DEVICE)
    config = LossConfig.preset("dapo")

    def run():
        loss, _ = grpo_loss(logprobs, advantages, config, old_logprobs=old)
        torch.autograd.grad(loss, logprobs)

    benchmark(_synchronised(run))


def test_group_advantages(benchmark):
    rewards = torch.randn(4096, 4, device=DEVICE)
    benchmark(_synchronised(lambda: group_advantages(rewards, mode="gdpo")))
