"""A frozen base model in 4 bits under a LoRA adapter (QLoRA, Dettmers et al., arXiv 2305.14314), by `bitsandbytes`.

The linear layers but the head hold NF4 codes in blocks of 64 whose scales are themselves 8 bit: 4.13 bits a number.
Embedding, norms, biases, head and adapter keep the run's dtype, and so do all products.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How `from_pretrained` is to quantise; products are computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_trainable(model: nn.Module) -> None:
    """On a CPU with AVX512-BF16 `bitsandbytes` repacks a layer for good at its first pass in evaluation mode.

    The repacked layer has no backward pass; as rollouts and updates take turns here, it must stay as it is.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer holds 4-bit codes."""
    return hasattr(getattr(module, "weight", None), "quant_state")


def dequantised(layer: nn.Module) -> Tensor:
    """(out, in) float32: the weight that a quantised layer stands for."""
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).float()


def shell_of(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same architecture without storage and without a word of quantisation, to save weights through."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        shell = type(model)(config)
    shell.generation_config = copy.deepcopy(model.generation_config)
    nn.Module.to(shell, dtype=dtype)
    return shell
