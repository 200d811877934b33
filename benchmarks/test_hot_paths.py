"""pytest-benchmark suite of what a training step spends its time in, very small: `pytest benchmarks --benchmark-only`.

On the CPU, a Qwen2 of hidden size 128; each call takes well under a second.
"""

from dataclasses import replace

import pytest

from benchmarks.ablations.contenders import CONTENDERS
from benchmarks.ablations.work import FULL, World
from benchmarks.step.contenders import OurStep, random_rollout
from benchmarks.step.work import TINY, Size, config_of
from grpo_fast.grpo import update
from grpo_fast.models.policy import Policy
from grpo_fast.packing import pack

SCALE = replace(
    FULL, shape=TINY, prompts=4, group=4, prompt_tokens=(24, 64), median=32, longest=96, new_tokens=16
)
SIZE = Size(prompts=4, group=4, prompt_tokens=32, new_tokens=16)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SCALE)


@pytest.mark.parametrize("part", ["update", "generation", "scoring", "optimizer"])
def test_part(benchmark, world, part):
    """Packed forward and backward, generation, reward scores, AdamW."""
    contender = CONTENDERS[part](world)
    contender.run()
    benchmark(contender.run)


def test_pack(benchmark):
    """Rows of 512 sequences, prompts shared."""
    made = World(replace(SCALE, prompts=64, group=8)).made
    benchmark(lambda: pack(made.prompts, made.completions, prompt_of=made.prompt_of, token_budget=8192))


@pytest.fixture(scope="module")
def step() -> OurStep:
    world = World(SCALE)
    return OurStep(Policy.from_model(world.policy.model, world.tokenizer), SIZE, config_of(SIZE))


def test_grpo_update(benchmark, step):
    """`grpo.update` on one rollout: packing, micro-batches, clipping, AdamW."""
    rollout = random_rollout(step.task, SIZE)
    benchmark(lambda: update(step.policy, step.optimizer, rollout, step.config, lr=0.0))


def test_whole_step(benchmark, step):
    """Rollout, reward function, update."""
    step()
    benchmark(step)
