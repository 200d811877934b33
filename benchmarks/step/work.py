"""The work every contender of the step benchmark does: models built from configurations, prompts, one reward.

Nothing is downloaded. Letters: P prompts, G completions a prompt, S = P·G.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.settings import (
    AdvantageSettings,
    LossSettings,
    OptimSettings,
    PolicySettings,
    RewardSettings,
    RolloutSettings,
    TrainConfig,
)
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.base import Sampling
from grpo_fast.models.policy import Policy
from grpo_fast.rewards.functions import RewardFunctions
from grpo_fast.scoring import Scorer
from grpo_fast.task import Task

REWARD = "benchmarks.step.reward:even_digits"
PAD, END = "<|pad|>", "<|end|>"
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen2 architecture."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    tied: bool = True

    def config(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Qwen2Config:
        """As transformers wants it; without a tokenizer there is no padding token."""
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            intermediate_size=self.inner,
            tie_word_embeddings=self.tied,
            max_position_embeddings=32768,
            pad_token_id=tokenizer.pad_token_id if tokenizer else None,  # pyright: ignore[reportArgumentType]
            eos_token_id=None,
            bos_token_id=None,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrix products."""
        width = self.hidden // self.heads
        return self.hidden * (2 * self.heads * width + 2 * self.key_heads * width + 3 * self.inner)


TINY = Shape(hidden=128, layers=4, heads=4, key_heads=2, inner=384, vocabulary=8192)
SMALL = Shape(hidden=256, layers=4, heads=4, key_heads=2, inner=1408, vocabulary=8192)
"""Its head makes 29% of its products' arithmetic, as that of Qwen2.5 0.5B makes 28%; of `TINY` it is 58%."""
MIDDLE = Shape(hidden=512, layers=2, heads=8, key_heads=2, inner=2816, vocabulary=1024)
QWEN = {
    "0.5b": Shape(hidden=896, layers=24, heads=14, key_heads=2, inner=4864, vocabulary=151936),
    "1.5b": Shape(hidden=1536, layers=28, heads=12, key_heads=2, inner=8960, vocabulary=151936),
    "7b": Shape(hidden=3584, layers=28, heads=28, key_heads=4, inner=18944, vocabulary=152064, tied=False),
    "14b": Shape(hidden=5120, layers=48, heads=40, key_heads=8, inner=13824, vocabulary=152064, tied=False),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much one step is."""

    prompts: int = 8
    group: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 32
    token_budget: int = 8192


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerBase:
    """One token a byte, words nobody writes for the rest of the vocabulary, padding and end as the last two."""
    names = [*bytes_to_unicode().values()]
    names += [f"w{i}" for i in range(vocabulary - len(names) - 2)]
    ids = {name: i for i, name in enumerate([*names, PAD, END])}
    return Qwen2Tokenizer(vocab=ids, merges=[], unk_token=PAD, pad_token=PAD, eos_token=END)


def model_of(
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """Random weights; the end token ends nothing, so every completion has the length asked for."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(tokenizer), dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def texts(count: int, length: int, seed: int = 0) -> list[str]:
    """Prompts of `length` letters, which are as many tokens."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for _ in range(count)]


def prompts_of(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[Prompt]:
    """Random prompts of exactly `length` tokens."""
    found = [
        Prompt(text=text, token_ids=tokenizer.encode(text), messages=None, columns={})
        for text in texts(count, length)
    ]
    assert all(len(prompt.token_ids) == length for prompt in found)
    return found


def config_of(
    size: Size,
    *,
    device: str = "cpu",
    lora_rank: int = 0,
    optimizer: str = "adamw",
    checkpointing: bool = False,
) -> TrainConfig:
    """A run's settings for this work: the GRPO preset without a KL term, rewards compared within their group."""
    return TrainConfig(
        engine=EngineSettings(max_mismatch=0.0),  # some rollouts' log-probs are made up
        device=device,
        policy=PolicySettings(lora_rank=lora_rank, gradient_checkpointing=checkpointing),
        rollout=RolloutSettings(
            prompts_per_step=size.prompts, group_size=size.group, max_new_tokens=size.new_tokens
        ),
        reward=RewardSettings(functions=(REWARD,)),
        advantage=AdvantageSettings(mode="scalarized", scale="group"),
        loss=LossSettings(preset="grpo", kl_coef=0.0),
        optim=OptimSettings(
            lr=LEARNING_RATE,
            betas=(0.9, 0.999),
            warmup_steps=0,
            optimizer=optimizer,  # pyright: ignore[reportArgumentType]
            token_budget=size.token_budget,
        ),
    )


def task_of(policy: Policy, size: Size, config: TrainConfig) -> Task:
    """The prompts, the reward function and the sampling: temperature 1, no end token."""
    functions = RewardFunctions(config.reward.functions, isolation="thread")
    functions.probe([])
    return Task(
        policy=policy,
        scorer=Scorer.create(config.reward, None, functions),
        sampling=Sampling(max_new_tokens=size.new_tokens),
        prompts=prompts_of(policy.tokenizer, size.prompts, size.prompt_tokens),
        heldout=[],
    )


def save(folder: Path, shape: Shape) -> None:
    """Model and tokenizer as a folder that every contender loads, so that all start from the same weights."""
    tokenizer = tokenizer_of(shape.vocabulary)
    model_of(shape, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
