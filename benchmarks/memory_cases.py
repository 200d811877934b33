"""The configurations that the planner is held against, and the models of each with random weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grpo_fast.config.settings import (
    DataSettings,
    LossSettings,
    OptimSettings,
    PolicySettings,
    RewardSettings,
    RolloutSettings,
    TrainConfig,
)
from grpo_fast.data.prompts import Prompt
from grpo_fast.engines.local import LocalEngine
from grpo_fast.fit import Models, work_of
from grpo_fast.memory.estimate import MemoryEstimate, Planner, Work
from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.policy import Policy
from grpo_fast.models.reward_data import Head, Layout
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.optim.optimizer import Optimizer
from grpo_fast.run.command import prepare_libraries

PAD, END = "<|pad|>", "<|end|>"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration; completions always reach their limit."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    family: Literal["qwen2", "llama"] = "qwen2"
    hidden: int = 512
    inner: int = 2048
    layers: int = 8
    heads: int = 8
    key_heads: int = 2
    vocabulary: int = 8192
    tied: bool = True
    lora_rank: int = 0
    checkpointing: bool = False
    kl: bool = False
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    budget: int = 512
    prompts: int = 8
    group: int = 4
    prompt: int = 32
    new: int = 25
    rows: int = 256
    reward: bool = True
    reward_tokens: int = 16384

    def described(self) -> dict[str, Any]:
        return asdict(self)

    def model(self) -> PreTrainedConfig:
        """The configuration of policy and reward model."""
        kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[self.family]
        return kind(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=32768,
            pad_token_id=256,
            bos_token_id=None,
            eos_token_id=257,
        )

    def config(self) -> TrainConfig:
        """The settings of the run."""
        return TrainConfig(
            device=self.device,
            dtype=self.dtype,
            policy=PolicySettings(
                model="random", lora_rank=self.lora_rank, gradient_checkpointing=self.checkpointing
            ),
            data=DataSettings(prompts="random", max_prompt_tokens=self.prompt, eval_size=1),
            reward=RewardSettings(model=("random",), overlap="off"),
            rollout=RolloutSettings(
                prompts_per_step=self.prompts,
                group_size=self.group,
                max_new_tokens=self.new,
                max_rows=self.rows,
            ),
            loss=LossSettings(kl_coef=0.04 if self.kl else 0.0),
            optim=OptimSettings(optimizer=self.optimizer, token_budget=self.budget),
        )


def work(case: Case) -> Work:
    """What the planner is told."""
    lora = LoraSettings(rank=case.lora_rank) if case.lora_rank else None
    models = Models(policy=case.model(), rewards=(case.model(),) if case.reward else (), lora=lora)
    here = work_of(replace(case.config(), device="cpu"), models)  # a GPU's memory can be planned without one
    return replace(here, device=case.device, reward_tokens=case.reward_tokens)


def planned(case: Case) -> MemoryEstimate:
    return Planner(work(case)).estimate()


@dataclass(frozen=True, kw_only=True)
class Built:
    """Everything a step needs."""

    config: TrainConfig
    policy: Policy
    reference: Policy | None
    reward: RewardModel | None
    optimizer: Optimizer
    engine: LocalEngine
    prompt: Prompt


def built(case: Case) -> Built:
    """Models with random weights, as a run would hold them."""
    config = case.config()
    prepare_libraries(1)
    vocabulary = {char: i for i, char in enumerate(bytes_to_unicode().values())} | {PAD: 256, END: 257}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=PAD, pad_token=PAD, eos_token=END)
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.model(), dtype=dtype).to(case.device)
    policy = Policy.from_model(
        model,
        tokenizer,
        lora=LoraSettings(rank=case.lora_rank) if case.lora_rank else None,
        gradient_checkpointing=case.checkpointing,
    )
    reward = None
    if case.reward:
        layout = Layout(heads=(Head(name="good"), Head(name="safe")))
        with torch.device(case.device):
            reward = RewardModel.from_config(
                case.model(), tokenizer, layout, dtype=dtype, device=case.device
            ).eval()
    optimizer = Optimizer(policy.trainable_parameters(), lr=1e-5, kind=case.optimizer)
    return Built(
        config=config,
        policy=policy,
        reference=policy.frozen_copy() if case.kl and not policy.is_lora else None,
        reward=reward,
        optimizer=optimizer,
        engine=LocalEngine(policy.model, max_rows=case.rows),
        prompt=Prompt(text="", token_ids=[], messages=None, columns={}),
    )


def _case(*shapes: dict[str, Any], **settings: Any) -> Case:
    """A case of the shapes put over one another, and its own settings."""
    merged: dict[str, Any] = {}
    for shape in (*shapes, settings):
        merged |= shape
    return Case(**merged)


# Prompts and completions make rows that are exactly full, two or more of them: the peak of a long run.
_SMALL = {"hidden": 512, "inner": 2048, "layers": 8}  # 30 million parameters and the vocabulary
_MIDDLE = {"hidden": 768, "inner": 3072, "layers": 12, "heads": 12, "key_heads": 4}  # 105 million
_LARGE = {"hidden": 1024, "inner": 4096, "layers": 16, "heads": 16, "key_heads": 4}  # 243 million
_QWEN_HALF = {"hidden": 896, "inner": 4864, "layers": 24, "heads": 14, "key_heads": 2, "vocabulary": 151_936}
_QWEN_ONE = {"hidden": 1536, "inner": 8960, "layers": 28, "heads": 12, "key_heads": 2, "vocabulary": 151_936}
_QWEN_SEVEN = {
    "hidden": 3584,
    "inner": 18_944,
    "layers": 28,
    "heads": 28,
    "key_heads": 4,
    "vocabulary": 152_064,
}
_GPU = {"device": "cuda", "dtype": "bfloat16", "prompt": 256, "new": 257, "group": 7, "prompts": 32}
CASES: dict[str, Case] = {
    "small": _case(_SMALL, budget=1024, prompts=16),
    "small-checkpointing": _case(_SMALL, checkpointing=True),
    "small-lora": _case(_SMALL, lora_rank=16),
    "small-llama-50k": _case(
        _SMALL, family="llama", tied=False, vocabulary=50_000, kl=True, budget=256, prompts=4
    ),
    "middle-checkpointing": _case(_MIDDLE, checkpointing=True, budget=256, prompts=4),
    "middle-adafactor": _case(_MIDDLE, optimizer="adafactor", budget=256, prompts=4),
    "middle-lora-150k": _case(_MIDDLE, lora_rank=16, vocabulary=150_000, budget=256, prompts=4),
    "large-checkpointing": _case(_LARGE, checkpointing=True, budget=128, prompts=2, reward=False),
    "small-group-16": _case(_SMALL, prompt=64, new=13, group=16, prompts=4),
    "small-long": _case(_SMALL, prompt=384, new=161, prompts=1, budget=1024),
    "middle-lora-checkpointing": _case(_MIDDLE, lora_rank=8, checkpointing=True, kl=True),
    "large-lora": _case(_LARGE, lora_rank=16, budget=128, prompts=2),
    "small-bfloat16": _case(_SMALL, dtype="bfloat16", budget=256, prompts=4),
    "small-150k": _case(_SMALL, vocabulary=150_000, budget=256, prompts=4),
    "small-budget-2048": _case(_SMALL, budget=2048, prompts=32, reward=False),
    "middle": _case(_MIDDLE),
    "middle-lora-50k": _case(_MIDDLE, lora_rank=16, vocabulary=50_000, kl=True),
    "large-adafactor": _case(
        _LARGE, optimizer="adafactor", checkpointing=True, budget=256, prompts=4, reward=False, kl=True
    ),
    "gpu-0.5b": _case(_QWEN_HALF, _GPU, budget=16_384),
    "gpu-0.5b-checkpointing": _case(_QWEN_HALF, _GPU, budget=16_384, checkpointing=True, kl=True),
    "gpu-0.5b-lora": _case(_QWEN_HALF, _GPU, budget=16_384, lora_rank=16),
    "gpu-1.5b": _case(_QWEN_ONE, _GPU, budget=8192),
    "gpu-1.5b-checkpointing": _case(_QWEN_ONE, _GPU, budget=16_384, checkpointing=True),
    "gpu-7b-lora": _case(
        _QWEN_SEVEN, _GPU, tied=False, budget=8192, lora_rank=16, checkpointing=True, reward=False
    ),
    "gpu-7b-adafactor": _case(
        _QWEN_SEVEN, _GPU, tied=False, budget=8192, checkpointing=True, optimizer="adafactor", reward=False
    ),
}
