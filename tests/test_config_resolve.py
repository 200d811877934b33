"""What the settings mean on a machine: loss, advantage, device, dtype, run folder, model folders."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from grpo_kernels import LossConfig

from grpo_fast.config.command_line import parse
from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.config.resolve import (
    advantage_choice,
    check_packages,
    check_paths,
    constant_normalizer,
    loss_config,
    resolve_device,
    resolve_dtype,
    run_path,
)
from grpo_fast.config.rules import FieldError
from grpo_fast.config.settings import (
    AdvantageSettings,
    DataSettings,
    LossSettings,
    MemorySettings,
    OptimSettings,
    PolicySettings,
    RewardSettings,
    TrainConfig,
)
from grpo_fast.errors import UserError


def test_loss_config_is_the_preset_with_the_given_fields():
    assert loss_config(TrainConfig()) == LossConfig.preset("grpo")
    changed = loss_config(TrainConfig(loss=LossSettings(preset="dapo", kl_coef=0.5)))
    assert changed == replace(LossConfig.preset("dapo"), kl_coef=0.5)
    with pytest.raises(FieldError, match=r"^loss.dual_clip must be"):
        loss_config(TrainConfig(loss=LossSettings(preset="sapo", dual_clip=3.0)))


def test_every_field_of_the_loss_can_be_set():
    names = {item.name for item in fields(LossConfig.preset("grpo"))}
    assert names == {item.name for item in fields(LossSettings)} - {"preset", "mask_truncated"}


def test_advantage_and_normalizer_follow_the_preset():
    def choice(preset: str, **chosen: str) -> tuple[str, str]:
        return advantage_choice(
            TrainConfig(loss=LossSettings(preset=preset), advantage=AdvantageSettings(**chosen))  # pyright: ignore
        )

    assert choice("grpo") == ("gdpo", "group") and choice("dr_grpo") == ("scalarized", "none")
    assert choice("rloo")[0] == "leave_one_out" and choice("reinforce_pp") == ("scalarized", "batch")
    assert choice("dr_grpo", mode="per_head", scale="batch") == ("per_head", "batch")
    assert constant_normalizer(TrainConfig(loss=LossSettings(preset="dr_grpo")), 10) == 640.0
    assert constant_normalizer(TrainConfig(loss=LossSettings(preset="luspo")), 10) == 10.0


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_device(TrainConfig()).type == "cpu"
    with pytest.raises(FieldError, match="device is cuda, but PyTorch finds no CUDA device; use auto or cpu"):
        resolve_device(TrainConfig(device="cuda"))
    with pytest.raises(FieldError, match=r"policy.backend triton needs a CUDA device"):
        resolve_device(TrainConfig(policy=PolicySettings(backend="triton")))
    with pytest.raises(FieldError, match=r"engine.cuda_graphs needs a CUDA device"):
        resolve_device(TrainConfig(engine=EngineSettings(cuda_graphs="on")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(TrainConfig()).type == "cuda"
    assert resolve_device(TrainConfig(device="cuda:1")).index == 1
    with pytest.raises(FieldError, match="device is cuda:2, but PyTorch finds 2 CUDA devices"):
        resolve_device(TrainConfig(device="cuda:2"))
    assert resolve_dtype(TrainConfig(), torch.device("cpu")) is torch.float32
    assert resolve_dtype(TrainConfig(), torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype(TrainConfig(dtype="float32"), torch.device("cuda")) is torch.float32


def test_run_folders_are_new(tmp_path: Path):
    config = TrainConfig(output_dir=str(tmp_path), name="mine")
    assert run_path(config) == tmp_path / "mine"
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"run folder .*mine already exists: choose another --name"):
        run_path(config)
    unnamed = replace(config, name="")
    first = run_path(unnamed)
    assert first.name.startswith("miniature-")
    first.mkdir()
    assert run_path(unnamed) != first


def test_model_folders_are_looked_at_before_loading(tmp_path: Path):
    def config(model: str = "org/name", reward: str = "") -> TrainConfig:
        return parse(
            [
                "--policy.model",
                model,
                "--data.prompts",
                "p",
                "--reward.functions",
                "m:f",
                "--reward.model",
                reward,
            ]
        ).config

    check_paths(TrainConfig())
    check_paths(config())
    for model in ("./none", str(tmp_path / "none"), "a/b/c"):
        with pytest.raises(
            FieldError, match=r"policy.model must be the folder of a model, .* does not exist"
        ):
            check_paths(config(model))
    with pytest.raises(FieldError, match=r"policy.model is the folder .*, which has no config.json"):
        check_paths(config(str(tmp_path)))
    with pytest.raises(
        FieldError, match=r"reward.model must be the folder of a model, ./org/name does not exist"
    ):
        check_paths(config(reward="./org/name"))
    (tmp_path / "config.json").write_text("{}")
    check_paths(config(str(tmp_path), str(tmp_path)))
    with pytest.raises(FieldError, match="got the file"):
        check_paths(config(str(tmp_path / "config.json")))


@pytest.mark.parametrize(
    "memory", [{"optimizer": "host"}, {"optimizer": "while_training"}, {"activations_on_host": True}]
)
def test_moving_to_the_host_needs_another_device(memory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        FieldError, match=rf"^memory.{next(iter(memory))} needs a CUDA device: the run is on cpu"
    ):
        resolve_device(TrainConfig(memory=MemorySettings(**memory)))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo_fast.config.resolve.find_spec", lambda name: None)
    check_packages(TrainConfig())
    eight = TrainConfig(optim=OptimSettings(optimizer="adamw8bit"))
    with pytest.raises(
        FieldError, match=r"^optim.optimizer adamw8bit needs the package torchao: .*\[lowbit\]"
    ):
        check_packages(eight)
    four = PolicySettings(model="x", quantize="nf4", lora_rank=8)
    data, reward = DataSettings(prompts="x.jsonl"), RewardSettings(functions=("a:b",))
    with pytest.raises(FieldError, match=r"^policy.quantize nf4 needs the package bitsandbytes"):
        check_packages(TrainConfig(policy=four, data=data, reward=reward))
    monkeypatch.setattr("grpo_fast.config.resolve.find_spec", lambda name: object())
    check_packages(eight)
