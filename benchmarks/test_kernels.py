"""pytest-benchmark suite of the kernels at a size for every machine: `pytest benchmarks --benchmark-only`."""

import pytest
import torch
from grpo_kernels import LossConfig, group_advantages, grpo_loss

from benchmarks.contenders import CONTENDERS, Problem

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


@pytest.mark.parametrize("mode", ["trained", "frozen", "forward"])
@pytest.mark.parametrize("name", ["products", "triton" if DEVICE == "cuda" else "torch", "eager"])
def test_loss_head(benchmark, problem, name, mode):
    benchmark(_synchronised(CONTENDERS[name](problem, mode)))


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
