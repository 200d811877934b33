"""Compiled decoder layers in bfloat16 on a CUDA device: as near the truth as plain ones, at every length."""

import copy

import pytest
import torch

from grpo_fast.config.resolve import _missing_compiler
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.policy import Policy
from grpo_fast.packing import PackedBatch, pack
from tests.tiny import causal_lm

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and bool(_missing_compiler(torch.device(DEVICE))),
        reason="torch.compile needs a C compiler",
    ),
]


def batch(length: int) -> PackedBatch:
    draw = torch.Generator().manual_seed(length)
    completions = [torch.randint(5, 500, (length + i,), generator=draw).tolist() for i in range(8)]
    (packed,) = pack([[5, 6, 7], [8, 9]], completions, prompt_of=[0, 1] * 4, token_budget=1 << 20)
    return packed.to(DEVICE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_compiled_layers_are_as_near_the_truth_as_plain_ones(family, checkpointing):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = causal_lm(family, len(tokenizer), hidden_size=128)
    model.to(DEVICE, torch.bfloat16)  # type: ignore[call-arg]
    exact = Policy.from_model(copy.deepcopy(model).float(), tokenizer)
    plain = Policy.from_model(copy.deepcopy(model), tokenizer)
    compiled = Policy.from_model(model, tokenizer, gradient_checkpointing=checkpointing, compiled=True)
    layers = compiled.compiled
    assert layers is not None
    for place, length in enumerate((20, 37, 64, 9)):
        packed = batch(length)
        grads = []
        for policy in (exact, plain, compiled):
            policy.zero_grad()
            policy.sft_loss(packed, len(packed.targets)).backward()
            grads.append(
                torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None])
            )
        truth, usual, found = grads
        assert (found - truth).norm() <= 1.5 * (usual - truth).norm() + 1e-3 * truth.norm()
        if place == 0:
            graphs = layers.graphs
        assert layers.graphs == graphs and not layers.off
