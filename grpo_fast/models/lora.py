"""Low-rank adapters for the policy and the reward model, through `peft`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
from grpo_fast.models.quantized import dequantised, is_quantised


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (Hu et al., arXiv 2106.09685) through `peft`."""

    rank: int = 16
    """Rank of each adapter."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter; "all-linear" is every one except the head."""
    seed: int = 0
    """Of the adapter's first weights."""


def add_lora(model: PreTrainedModel, lora: LoraSettings, *, trained_whole: tuple[str, ...] = ()) -> PeftModel:
    """Put adapters on the linear layers of `model`, in place; everything else is frozen.

    Modules named in `trained_whole` (the heads of a reward model) get no adapter and are trained as they are. Raises
    UserError where a target names no layer.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (peft annotates int, any number works)
        target_modules=targets,
        exclude_modules=list(trained_whole) or None,
        task_type=None if trained_whole else "CAUSAL_LM",
    )
    try:
        with quiet_peft(), torch.random.fork_rng():
            torch.manual_seed(lora.seed)
            # Adapters in the model's own dtype: the optimizer keeps the float32 copies.
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"lora target_modules {targets}: {pretrained.one_line(error)}") from error
    assert isinstance(wrapped, PeftModel)
    for name in trained_whole:
        model.get_submodule(name).requires_grad_(True)
    return wrapped


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without peft's warnings: of a property that transformers renamed, and of tied heads, refused by name below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the plain model, adapters added to the weights they belong to, on the CPU."""
    return {name: value.cpu() for name, value in _merged(model, model.state_dict().items())}


@torch.no_grad()
def _merged(model: PreTrainedModel, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Not peft's in-place merge: undoing that one leaves rounding errors in the weights that go on training.

    A weight in 4 bits takes its adapter in float32 and is then rounded to the model's dtype.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    quantised = {name: module for name, module in model.named_modules() if is_quantised(module)}
    for key, value in named:
        coded = next((name for name in quantised if key.startswith(f"{name}.weight")), None)
        if coded is not None and key != f"{coded}.weight":
            continue  # scales and tables of the codes
        value = value.detach() if coded is None else dequantised(quantised[coded])
        dtype = value.dtype if coded is None else model.dtype
        owner = next((name for name in adapted if key.startswith(f"{name}.")), None)
        if owner is None:
            yield key, value.to(dtype)
            continue
        inner = key[len(owner) + 1 :]
        if not inner.startswith("base_layer."):
            continue
        if inner == "base_layer.weight":
            layer: Any = adapted[owner]
            for adapter in layer.active_adapters:
                value = value.float() + layer.get_delta_weight(adapter).float()
        yield f"{owner}.{inner.removeprefix('base_layer.')}", value.to(dtype)
