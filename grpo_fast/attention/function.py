"""The one attention function of this project, registered with transformers as `ATTENTION_NAME`.

A model prepared by `use_packed_attention` is called as `model.base_model(input_ids=..., position_ids=...,
attention_mask=None, use_cache=False, plan=plan)`. What the plan is decides what happens in every layer:

- `PackedPlan`: several sequences side by side in one row, completions sharing their prompt. None sees
another.
- `PrefillPlan`: the same, and the keys and values are kept.
- `DecodePlan`: one new token for each of B rows against a KV cache.
- None: ordinary causal attention, so a prepared model still works in other hands (`generate` included).

No mask function is registered beside it, so transformers builds no mask and hands on the keywords.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from grpo_fast.attention import paths
from grpo_fast.attention.backends import Case, choose
from grpo_fast.attention.decode import DecodePlan
from grpo_fast.attention.plan import PackedPlan, PrefillPlan
from grpo_fast.errors import UserError

__all__ = ["ATTENTION_NAME", "DecodePlan", "PackedPlan", "PrefillPlan", "attention", "use_packed_attention"]

ATTENTION_NAME = "grpo_fast_packed"
LAYER_KINDS = {"full_attention", "sliding_attention"}
NO_INTERFACE = "it does not take its attention from transformers' AttentionInterface"
UNKNOWN_TERMS = ("sinks", "position_bias", "alibi", "head_mask")
"""Keywords by which models change the scores in a way that is not implemented here."""


def attention(
    module: nn.Module,
    query: Tensor,  # (1, H, L, D); decoding (B, H, 1, D)
    key: Tensor,  # (1, K, L, D); decoding (B, K, 1, D)
    value: Tensor,  # (1, K, L, Dv); decoding (B, K, 1, Dv)
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,) attention sinks
    plan: PackedPlan | DecodePlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, L, H, Dv); decoding (B, 1, H, Dv)
    """Attention of one layer in the form transformers calls it; returns the output and None for the weights.

    Raises `UserError` for what would be computed wrongly: dropout, an attention mask together with a plan,
    bidirectional layers and position biases.
    """
    for name in UNKNOWN_TERMS:
        if kwargs.get(name) is not None:
            raise UserError(f"{type(module).__name__} passes {name} to its attention, which is not supported")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UserError(f"{type(module).__name__} is not causal; only causal language models can be trained")
    if dropout:
        raise UserError(
            f"attention dropout must be 0, {type(module).__name__} has {dropout}: set it in the config"
        )
    if plan is None:
        return _plain(query, key, value, attention_mask, scaling, sliding_window, softcap, s_aux), None
    if attention_mask is not None:
        raise UserError(
            "an attention_mask cannot be combined with plan=; call the model with attention_mask=None"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(plan, DecodePlan):
        if s_aux is not None:
            raise UserError(
                f"{type(module).__name__} has attention sinks, which the built-in engine cannot decode"
            )
        layer = _layer_index(module)
        return plan.attend(
            query, key, value, layer, scale=scale, window=sliding_window, softcap=softcap
        ), None
    if query.shape[0] != 1 or query.shape[2] != plan.length:
        raise ValueError(
            f"the plan covers (1, {plan.length}) positions, got {(query.shape[0], query.shape[2])}"
        )
    if isinstance(plan, PrefillPlan):
        plan.kept[_layer_index(module)] = key[0], value[0]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, D)
    return _packed(q, k, v, plan, scale, sliding_window, softcap, s_aux)[None], None


def _layer_index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise UserError(f"{type(module).__name__} has no layer_idx, so the engine cannot cache its keys")
    return index


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if attention_mask is not None:
        raise UserError(
            f"{ATTENTION_NAME} takes no attention mask; use set_attn_implementation('sdpa') for that"
        )
    out = paths.causal(query, key, value, scale=scaling, window=sliding_window, softcap=softcap, sinks=sinks)
    return out.transpose(1, 2).contiguous()


def _packed(
    q: Tensor,  # (L, H, D)
    k: Tensor,  # (L, K, D)
    v: Tensor,  # (L, K, Dv)
    plan: PackedPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,  # (H,)
) -> Tensor:  # (L, H, Dv)
    if window is not None and window >= max(plan.k_lens):
        window = None
    case = Case(
        q.device,
        q.dtype,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        v.shape[2],
        window is not None,
        softcap,
        sinks is not None,
    )
    return choose(case, plan).run(q, k, v, plan, scale=scale, window=window, softcap=softcap, sinks=sinks)


def use_packed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare `model` (in place; also returned) to be called with `plan=`.

    Raises `UserError` for models that would leak between packed sequences or ignore the plan: recurrent and
    convolution layers, attention kinds other than full and sliding-window, encoder-decoders, and models whose
    attention does not go through transformers' `AttentionInterface`. The check reads the configuration and
    the module list only.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder; a decoder-only language model is needed")
    if why := packing_obstacle(model):
        raise UserError(f"{name} cannot be packed: {why}")
    model.set_attn_implementation(ATTENTION_NAME)
    kept = model.config.get_text_config(decoder=True)._attn_implementation
    if kept != ATTENTION_NAME:
        raise UserError(f"{name} refused the attention {ATTENTION_NAME!r}: it kept {kept!r}")
    base = model.base_model
    if not getattr(base, "_grpo_fast_guarded", False):
        base.register_forward_pre_hook(_guard, with_kwargs=True)
        base._grpo_fast_guarded = True  # pyright: ignore[reportArgumentType]
    return model


def packing_obstacle(model: PreTrainedModel) -> str | None:
    """Why sequences packed into one row would see each other in this model, None where they need not.

    Reads the configuration and the module list; `models.self_check` asks the model itself.
    """
    if why := config_obstacle(type(model), model.config):
        return why
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.RNNBase)):
            return f"{path} is a {type(module).__name__}, which mixes neighbouring sequences"
    can_set = getattr(model, "_can_set_attn_implementation", None)
    return NO_INTERFACE if can_set is not None and not can_set() else None


def config_obstacle(model_class: type, config: PreTrainedConfig) -> str | None:
    """`packing_obstacle` as far as it shows before the model is made."""
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - LAYER_KINDS
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    return None if getattr(model_class, "_supports_attention_backend", False) else NO_INTERFACE


def use_attention(model: PreTrainedModel) -> None:
    """Give a model without `packing_obstacle` this attention, where it has not got it."""
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)


def use_own_attention(model: PreTrainedModel) -> None:
    """Give a model that cannot be packed an attention of transformers': SDPA where it has it, else eager."""
    if getattr(model.config, "_attn_implementation", None) not in (ATTENTION_NAME, None):
        return
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")


def _guard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse the two calls that transformers would compute silently wrong with a mask-free attention."""
    if kwargs.get("plan") is not None:
        if kwargs.get("use_cache") is not False or kwargs.get("past_key_values") is not None:
            raise UserError("call the model with use_cache=False and no past_key_values when passing plan=")
        return
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
        raise UserError(
            f"{ATTENTION_NAME} sees no padding mask: pass plan=, or set_attn_implementation('sdpa') first"
        )


AttentionInterface.register(ATTENTION_NAME, attention)
