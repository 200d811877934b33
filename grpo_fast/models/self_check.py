"""Does this very model compute the same when its sequences are packed? Asked once, at load.

A model whose layers mix positions beside attention, or drop the plan on its way to attention, would train on
wrong probabilities without a word. So would one whose logits are not hidden state x head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_fast.errors import UserError
from grpo_fast.models.head import head_of
from grpo_fast.packing import PackedBatch, pack

if TYPE_CHECKING:
    from grpo_fast.models.compiled import CompiledLayers

# Limits on relative errors. bfloat16 rounds differently in every kernel: there the mean over positions is
# compared, which tells a leak (tenths) from noise; in float32 the largest.
HIDDEN_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 8e-2}
LOGIT_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def packed_hidden_states(
    model: PreTrainedModel, batch: PackedBatch, compiled: CompiledLayers | None = None
) -> Tensor:
    """Last hidden states of every position of a packed row: (L, H), model dtype; with `compiled` layers if given."""
    output = _base(model)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,  # with a cache the model treats packed sequences as one and they leak
        plan=batch.plan if compiled is None else compiled.seal(batch.plan),
    )
    return output.last_hidden_state[0]


@torch.no_grad()
def check_packing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Packed completions that share a prompt must have the hidden states of each sequence alone.

    Alone means: unpacked, under the model's own eager attention. Raises UserError with the error found.
    """
    prompts, completions, prompt_of = _sequences(tokenizer)
    rows = [prompts[owner] + completion for owner, completion in zip(prompt_of, completions, strict=True)]
    alone_of = [
        output.last_hidden_state[0, -len(completion) - 1 : -1].float()
        for output, completion in zip(_alone(model, _base(model), rows), completions, strict=True)
    ]
    (batch,) = pack(prompts, completions, prompt_of=prompt_of, token_budget=4096)
    batch = batch.to(model.device)
    packed = packed_hidden_states(model, batch).index_select(0, batch.hidden_index).float()
    alone = torch.cat([alone_of[i] for i in batch.sequence_index.tolist()])
    errors = (packed - alone).norm(dim=1) / alone.norm(dim=1)
    error = (errors.max() if model.dtype == torch.float32 else errors.mean()).item()
    limit = HIDDEN_LIMIT[model.dtype]
    if not error <= limit:  # also for NaN
        raise UserError(
            f"{type(model).__name__}: hidden states of packed sequences differ from one-by-one by "
            f"{error:.1%} (limit {limit:.1%}); its layers leak between sequences in a row; not supported"
        )


@torch.no_grad()
def check_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Hidden state x head (bias, softcap, scale) must be the model's own logits; UserError if not."""
    prompts, completions, prompt_of = _sequences(tokenizer)
    rows = [prompts[owner] + completion for owner, completion in zip(prompt_of, completions, strict=True)]
    head, limit = head_of(model), LOGIT_LIMIT[model.dtype]
    for body, whole in zip(_alone(model, _base(model), rows), _alone(model, model, rows), strict=True):
        difference = head.logits(body.last_hidden_state) - whole.logits.float()
        error = (difference.abs().max() / whole.logits.abs().max()).item()
        if not error <= limit:
            raise UserError(
                f"{type(model).__name__}: hidden state x head differs from the model's logits by "
                f"{error:.1%} of the largest; this head is not supported"
            )


def _base(model: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, model.base_model)


def _alone(model: PreTrainedModel, module: nn.Module, rows: list[list[int]]) -> list[Any]:
    """What `module` (the model or its base) gives for each row by itself, under eager attention."""
    packed_attention = str(model.config._attn_implementation)
    model.set_attn_implementation("eager")
    try:
        return [module(input_ids=torch.tensor([row], device=model.device), use_cache=False) for row in rows]
    finally:
        model.set_attn_implementation(packed_attention)


def _sequences(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Two prompts, five short completions of ordinary tokens and their prompts; always the same."""
    special = set(tokenizer.all_special_ids)
    ordinary = sorted(i for i in tokenizer.get_vocab().values() if i not in special) or [0]

    def draw(length: int, stride: int) -> list[int]:
        return [ordinary[(k + 1) * stride % len(ordinary)] for k in range(length)]

    prompts = [draw(9, 7919), draw(6, 104729)]
    completions = [draw(length, 1299709 + 2 * length) for length in (5, 3, 8, 4, 6)]
    return prompts, completions, [0, 0, 0, 1, 1]
