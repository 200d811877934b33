"""Saved policies, adapters and reward models: one file of a sound folder is hostile."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from grpo_fast.models.lora import LoraSettings
from grpo_fast.models.policy import Policy
from grpo_fast.models.policy_files import SavedPolicy
from grpo_fast.models.reward_data import Head, read_layout
from grpo_fast.models.reward_model import RewardModel, SavedRewardModel
from grpo_fast.trust.distance import FILE, FeatureStatistics
from tests.fuzz.target import Target
from tests.tiny_models import byte_tokenizer, causal_model, reward_model

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@functools.cache
def sound() -> Path:
    """A folder with a policy, an adapter on it, and a reward model."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = Path(tempfile.mkdtemp(prefix="grpo-fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    Policy.from_model(causal_model("llama", **SMALL), byte_tokenizer()).save(place / "policy")
    adapted = Policy.load(place / "policy", lora=LoraSettings(rank=2))
    adapted.save(place / "adapter")
    judge = reward_model(
        [Head(name="safety"), Head(name="tone", kind="binary")],
        "llama",
        **SMALL,  # pyright: ignore[reportArgumentType]
    )
    judge.statistics = FeatureStatistics.fit(torch.randn(40, 16), torch.randn(20, 16))
    judge.save(place / "reward")
    return place


def _content(of: str, name: str) -> Callable[[], list[bytes]]:
    return lambda: [(sound() / of / name).read_bytes()]


def _folder(of: str, name: str, data: bytes, folder: Path) -> Path:
    path = folder / of
    if not path.exists():
        shutil.copytree(sound() / of, path)
    (path / name).write_bytes(data)
    return path


def _reading(of: str, name: str, read: Callable[[Path], Any]):
    def run(data: bytes, folder: Path) -> None:
        path = _folder(of, name, data, folder)
        try:
            read(path)
        finally:
            shutil.copyfile(sound() / of / name, path / name)

    return run


def _both(path: Path) -> None:
    RewardModel.load(SavedRewardModel.read(path))


def _target(of: str, name: str, read: Callable[[Path], Any], *, share: float, form: Any = "json") -> Target:
    return Target(
        run=_reading(of, name, read), corpus=_content(of, name), form=form, share=share, limit_s=10.0
    )


TARGETS = {
    "policy.config": _target("policy", "config.json", SavedPolicy.read, share=0.1),
    "policy.tokenizer": _target("policy", "tokenizer.json", SavedPolicy.read, share=0.1),
    "policy.tokenizer_config": _target("policy", "tokenizer_config.json", SavedPolicy.read, share=0.1),
    "policy.load_config": _target("policy", "config.json", Policy.load, share=0.03),
    "policy.weights": _target("policy", "model.safetensors", Policy.load, share=0.03, form="safetensors"),
    "adapter.config": _target("adapter", "adapter_config.json", Policy.load, share=0.03),
    "adapter.weights": _target(
        "adapter", "adapter_model.safetensors", Policy.load, share=0.03, form="safetensors"
    ),
    "reward.config": _target("reward", "config.json", SavedRewardModel.read, share=0.1),
    "reward.heads": _target(
        "reward",
        "reward_heads.json",
        lambda path: read_layout(path / "reward_heads.json", "m").names,
        share=1.0,
    ),
    "reward.statistics": _target(
        "reward", FILE, lambda path: FeatureStatistics.load(path / FILE), share=1.0, form="safetensors"
    ),
    "reward.load": _target("reward", "reward_heads.json", _both, share=0.03),
    "reward.weights": _target("reward", "model.safetensors", _both, share=0.03, form="safetensors"),
}
