"""Liger's Triton kernels for the body of a model: RMSNorm, rotary embedding, gated MLP (arXiv 2410.10989)."""

import inspect

from transformers import PreTrainedModel

from grpo_fast.errors import UserError

BODY = ("rope", "rms_norm", "swiglu", "geglu")  # what of a model's body Liger may replace, as it names it


def apply_liger(model: PreTrainedModel) -> list[str]:
    """Replace what Liger has for this architecture, in place; returns the parts. The loss head stays ours.

    Liger exchanges the rotary embedding for the whole family, so every model of it in this process gets it; its kernels
    run on CUDA devices only. UserError where the package is missing or knows nothing of the architecture.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError:
        raise UserError("policy.liger needs the package liger-kernel: pip install liger-kernel") from None
    kind = model.config.get_text_config().model_type
    if kind not in known:
        raise UserError(f"policy.liger: Liger has no kernels for model type {kind}; leave it off")
    options = [name for name in inspect.signature(known[kind]).parameters if name != "model"]
    known[kind](**{name: name in BODY for name in options}, model=model)
    return [name for name in options if name in BODY]
