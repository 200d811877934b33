"""Does this very model compute the same when its sequences are packed? Asked once, at load.

A model whose layers mix positions beside attention, or drop the plan on its way to attention, would train on
wrong probabilities without a word: such a one runs one sequence a row instead, under its own attention. A model whose
logits are not hidden state x head, or that looks ahead, is refused.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_fast.attention.function import ATTENTION_NAME, use_own_attention
from grpo_fast.errors import UserError
from grpo_fast.models.head import head_of
from grpo_fast.models.pretrained import position_limit
from grpo_fast.packing import PackedBatch, pack

if TYPE_CHECKING:
    from grpo_fast.models.compiled import CompiledLayers

# Limits on relative errors. bfloat16 rounds differently in every kernel: there the mean over positions is
# compared, which tells a leak (tenths) from noise; in float32 the largest.
HIDDEN_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 8e-2}
LOGIT_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 3e-2}

log = logging.getLogger(__name__)


def hidden_states(
    model: PreTrainedModel, batch: PackedBatch, *, packed: bool, compiled: CompiledLayers | None = None
) -> Tensor:
    """Last hidden states of every position of a batch: (L, H), model dtype.

    Not `packed`: each segment in a forward pass of its own, behind its prefix, without the plan.
    """
    if packed:
        return packed_hidden_states(model, batch, compiled)
    plan, ids = batch.plan, batch.input_ids[0]
    outs = []
    for start, size, first, shared in zip(
        plan.q_starts, plan.q_lens, plan.prefix_starts, plan.prefix_lens, strict=False
    ):
        row = torch.cat([ids[first : first + shared], ids[start : start + size]])
        output = _base(model)(input_ids=row[None], use_cache=False)
        outs.append(output.last_hidden_state[0, shared:])
    return torch.cat(outs)


def run_one_by_one(model: PreTrainedModel, why: str) -> None:
    """Give the model its own attention back, and say once that its sequences are not packed."""
    use_own_attention(model)
    _say(type(model).__name__, why)


@cache
def _say(name: str, why: str) -> None:
    log.warning("%s runs one sequence a row: %s", name, why)


def packed_hidden_states(
    model: PreTrainedModel, batch: PackedBatch, compiled: CompiledLayers | None = None
) -> Tensor:
    """Last hidden states of every position of a packed row: (L, H), model dtype; with `compiled` layers if given.

    Raises UserError for sequences so long that the model would treat the whole row otherwise.
    """
    longest, (limit, why) = max(batch.plan.k_lens), position_limit(model.config) or (None, "")
    if why and limit is not None and longest > limit:
        raise UserError(
            f"{type(model).__name__}: a sequence has {longest} positions, more than its {limit}{why}"
        )
    output = _base(model)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,  # with a cache the model treats packed sequences as one and they leak
        plan=batch.plan if compiled is None else compiled.seal(batch.plan),
    )
    return output.last_hidden_state[0]


@torch.no_grad()
def packing_fault(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Packed completions that share a prompt must have the hidden states of each sequence alone.

    Alone means: unpacked, under the model's own eager attention. Returns what is wrong, None where nothing is.
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
    error = _relative_error(packed, alone, model.dtype)
    limit = HIDDEN_LIMIT[model.dtype]
    if error <= limit:  # not so for NaN
        return None
    return f"hidden states of packed sequences differ from one-by-one by {error:.1%} (limit {limit:.1%})"


@torch.no_grad()
def check_causal(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """No hidden state may depend on later tokens; UserError if one does.

    The packed attention sees to that itself; a model under its own attention is asked.
    """
    prompts, completions, _ = _sequences(tokenizer)
    row, kept = prompts[0] + completions[0], len(prompts[0])
    whole, begun = (
        _base(model)(input_ids=torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state[0]
        for ids in (row, row[:kept])
    )
    error = _relative_error(whole[:kept].float(), begun.float(), model.dtype)
    if not error <= HIDDEN_LIMIT[model.dtype]:
        raise UserError(
            f"{type(model).__name__}: its hidden states change by {error:.1%} with tokens that come later; only "
            "causal language models can be trained"
        )


def _relative_error(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return (errors.max() if dtype == torch.float32 else errors.mean()).item()


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
    """What `module` (the model or its base) gives for each row by itself, under an attention of transformers'."""
    own = str(model.config._attn_implementation)
    packed = own == ATTENTION_NAME
    if packed:
        model.set_attn_implementation("eager")
    try:
        return [module(input_ids=torch.tensor([row], device=model.device), use_cache=False) for row in rows]
    finally:
        if packed:
            model.set_attn_implementation(own)


def _sequences(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Two prompts, five short completions of ordinary tokens and their prompts; always the same."""
    special = set(tokenizer.all_special_ids)
    ordinary = sorted(i for i in tokenizer.get_vocab().values() if i not in special) or [0]

    def draw(length: int, stride: int) -> list[int]:
        return [ordinary[(k + 1) * stride % len(ordinary)] for k in range(length)]

    prompts = [draw(9, 7919), draw(6, 104729)]
    completions = [draw(length, 1299709 + 2 * length) for length in (5, 3, 8, 4, 6)]
    return prompts, completions, [0, 0, 0, 1, 1]
