"""Liger's kernels in the body: which parts are exchanged. Their numbers need a GPU (`tests/gpu`)."""

from typing import Any

import pytest
from transformers import BertConfig, BertLMHeadModel
from transformers.models.qwen2 import modeling_qwen2

from grpo_fast.config.resolve import resolve_device
from grpo_fast.config.rules import FieldError
from grpo_fast.config.settings import PolicySettings, TrainConfig
from grpo_fast.errors import UserError
from grpo_fast.models.liger import apply_liger
from tests.tiny_models import causal_model


@pytest.fixture(autouse=True)
def family_restored(monkeypatch):
    for name in ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP"):
        monkeypatch.setattr(modeling_qwen2, name, getattr(modeling_qwen2, name))


def test_the_body_is_exchanged_and_the_head_is_not():
    pytest.importorskip("liger_kernel")
    model = causal_model("qwen2")
    rotary, forward = modeling_qwen2.apply_rotary_pos_emb, type(model).forward
    assert apply_liger(model) == ["rope", "rms_norm", "swiglu"]
    assert modeling_qwen2.apply_rotary_pos_emb is not rotary
    body: Any = model.base_model
    for module in (body.norm, body.layers[0].input_layernorm, body.layers[1].mlp):
        assert "liger" in module.forward.__func__.__module__
    assert type(model).forward is forward and "forward" not in vars(model)


def test_an_architecture_without_kernels_is_named():
    pytest.importorskip("liger_kernel")
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    with pytest.raises(UserError, match="no kernels for model type bert"):
        apply_liger(BertLMHeadModel(BertConfig(vocab_size=50, **shape)))


def test_a_run_on_the_cpu_refuses_it():
    config = TrainConfig(device="cpu", policy=PolicySettings(liger=True))
    with pytest.raises(FieldError, match=r"policy.liger needs a CUDA device, the run is on cpu"):
        resolve_device(config)
