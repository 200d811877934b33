"""Low-rank adapters for the policy and the reward model, through `peft`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo_fast.errors import UserError
from grpo_fast.models import pretrained
from grpo_fast.models.quantized import dequantised, is_quantised
from grpo_fast.models.sharded import full


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


def read_lora(model: PreTrainedModel, folder: str) -> PeftModel:
    """Put a saved adapter on `model`, to be trained further; raises several unrelated kinds for a broken one."""
    with quiet_peft():
        return PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)


def refuse_lora_on_head(model: PreTrainedModel) -> None:
    """UserError for an adapter on the head or the embedding."""
    for role, module in (
        ("head", model.get_output_embeddings()),
        ("embedding", model.get_input_embeddings()),
    ):
        if isinstance(module, BaseTunerLayer) or hasattr(module, "modules_to_save"):
            name = next(name for name, found in model.named_modules() if found is module)
            raise UserError(
                f"lora target_modules: {name} is the {role} of {type(model).__name__}, and an adapter on it "
                "is not supported; take it out (all-linear leaves it out)"
            )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without peft's warnings: of a property that transformers renamed, and of tied heads, refused by name below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merged_state(model: PreTrainedModel, dtype: torch.dtype, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict of the plain model, adapters added to the weights they belong to, on the CPU.

    `dtype` is what weights in 4 bits and shared-out ones become. Weights that are shared out over processes are
    gathered by all of them, one after another; with `keep` False this one lets them go.
    """
    tied: dict[int, str] = {}
    alias: dict[str, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        first = tied.setdefault(id(parameter), name)
        if first != name:
            alias[name] = first
    named: dict[str, Tensor] = model.state_dict()
    named |= {name: parameters[name] for name in named if name in parameters}
    state: dict[str, Tensor] = {}
    for name, value in _merged(model, named.items(), dtype, tied=alias):
        if keep:
            state[name] = value.cpu()
    return state | {name: state[first] for name, first in alias.items() if first in state}


def merged_parameters(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the plain model, adapters added to the weights they belong to, one after another
    where they are; those in training are not changed. Shared-out weights are gathered in `dtype`, by all processes."""
    return _merged(model, model.named_parameters(), dtype)


@torch.no_grad()
def _merged(
    model: PreTrainedModel,
    named: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    tied: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Not peft's in-place merge: undoing that one leaves rounding errors in the weights that go on training.

    Weights in 4 bits are brought to the model's dtype, with their adapters in float32 before: rounded once. Names in
    `tied` are left out.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    quantised = {name: module for name, module in model.named_modules() if is_quantised(module)}
    for key, value in named:
        coded = next((name for name in quantised if key.startswith(f"{name}.weight")), None)
        if key in tied or (coded is not None and key != f"{coded}.weight"):
            continue  # scales and tables of the codes
        value = value.detach() if coded is None else dequantised(quantised[coded])
        result = dtype if coded is not None or isinstance(value, DTensor) else value.dtype
        owner = next((name for name in adapted if key.startswith(f"{name}.")), None)
        if owner is None:
            yield key, full(value, result)
            continue
        inner = key[len(owner) + 1 :]
        if not inner.startswith("base_layer."):
            continue
        if inner == "base_layer.weight":
            layer: Any = adapted[owner]
            for adapter in layer.active_adapters:
                value = value.float() + layer.get_delta_weight(adapter).detach().float()
        yield f"{owner}.{inner.removeprefix('base_layer.')}", full(value, result)


@contextmanager
def merged_adapters(model: PreTrainedModel, *, on_host: bool = False) -> Iterator[None]:
    """Inside, adapters are added to the weights they belong to and take no product of their own.

    Afterwards the weights are bit for bit what they were: they come back from copies, of which there is one for every
    adapted layer's weight, on the model's device or, `on_host`, in the host's memory. Nothing happens to a model
    without adapters. Raises UserError for weights that cannot be added to (quantised ones).
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers = [layer for layer in layers if not layer.disable_adapters and not layer.merged]
    for layer in layers:
        weight = layer.get_base_layer().weight
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UserError("engine.merge_lora: the base weights are quantised; leave it off")
    kept: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.get_base_layer().weight
                kept.append(
                    (layer, weight.detach().to("cpu", copy=True) if on_host else weight.detach().clone())
                )
                for adapter in layer.active_adapters:
                    weight.copy_(weight.float() + layer.get_delta_weight(adapter).float())
                layer._disable_adapters = True
        yield
    finally:
        with torch.no_grad():
            for layer, copy in kept:
                layer.get_base_layer().weight.copy_(copy)
                layer._disable_adapters = False
