"""From prompts and replies to the token ids a reward model reads.

Where it reads. `transformers` classifies a decoder's row at its rightmost token that is not the padding token, and so
does this project: trailing padding tokens are cut off before packing, which changes nothing for the token that is
read, since attention is causal. Packed scores therefore equal the checkpoint's own output on single rows and on padded
batches. When the padding token *is* the end token, neither ever sees the end of a reply: both read at the token
before, and a finished reply scores as the same reply cut off there. Use a tokenizer with a padding token of its own
where that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from grpo_fast.data.rated import RatedExample
from grpo_fast.errors import UserError
from grpo_fast.packing import PackedBatch, pack

PromptLike = str | list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of P different prompts and of S replies to them."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    prompt_of: list[int]
    """(S) each reply's prompt"""
    truncated: int = 0
    """Replies whose prompt lost its beginning to the length limit"""
    too_long: tuple[int, ...] = ()
    """Replies that do not fit by themselves, left empty here"""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptLike],
    completions: Sequence[str],
    *,
    max_tokens: int | None = None,
    where: Sequence[str] = (),
    skip_long: bool = False,
) -> Encoded:
    """Token ids of `completions[i]` as the answer to `prompts[i]`; a prompt that comes again is kept once.

    Messages go through the tokenizer's chat template, the reply as the assistant's turn. Without a template, and for
    plain text, prompt and reply are put one after the other and the end token follows. A sequence of more than
    `max_tokens` loses the beginning of its prompt (a start token stays), and nothing of its reply: a reply that leaves
    no room for one token of its prompt raises UserError, which names `where[i]` if it is given, or with `skip_long`
    is left empty and noted.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
    opened: dict[int, str] = {}
    rows = [_row(tokenizer, p, c, opened) for p, c in zip(prompts, completions, strict=True)]
    index: dict[str, int] = {}
    prompt_of = [index.setdefault(prompt, len(index)) for prompt, _ in rows]
    start = _start_token(tokenizer)
    prompt_ids = [
        ids if start is None or ids[:1] == [start] else [start, *ids]
        for ids in _token_ids(tokenizer, list(index))
    ]
    completion_ids = _token_ids(tokenizer, [reply for _, reply in rows])
    truncated = 0
    too_long: list[int] = []
    for i, ids in enumerate(completion_ids if max_tokens is not None else ()):
        prompt = prompt_ids[prompt_of[i]]
        room = cast(int, max_tokens) - len(ids)
        if len(prompt) <= room:
            continue
        first = prompt[:1] if start is not None else []
        if room < 1 + len(first) and skip_long:
            too_long.append(i)
            completion_ids[i] = []
            room = cast(int, max_tokens)
            if len(prompt) <= room:
                continue
        elif room < 1 + len(first):
            raise UserError(
                f"{where[i] if where else f'reward model, reply {i + 1}'}: the reply has {len(ids)} tokens, with its "
                f"prompt it may have {max_tokens} (data.max_tokens or the model's positions, the smaller): leave it out"
            )
        truncated += 1
        prompt_of[i] = len(prompt_ids)  # its own copy, so that what is cut depends on this reply alone
        prompt_ids.append([*first, *prompt[len(prompt) - room + len(first) :]])
    return Encoded(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        prompt_of=prompt_of,
        truncated=truncated,
        too_long=tuple(too_long),
    )


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[RatedExample], *, max_tokens: int | None
) -> Encoded:
    """`encode` of every reply of `examples`; UserError names the file and line of one that is too long."""
    return encode(
        tokenizer,
        [e.prompt for e in examples for _ in e.replies],
        [reply for e in examples for reply in e.replies],
        max_tokens=max_tokens,
        where=[e.where or "ratings" for e in examples for _ in e.replies],
    )


def _row(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptLike, completion: str, opened: dict[int, str]
) -> tuple[str, str]:
    """The text up to the reply, and from it on; `opened` keeps what the template makes of each prompt (by its id)."""
    end = str(tokenizer.eos_token or "")
    if isinstance(prompt, str):
        return prompt, completion + end
    if tokenizer.chat_template is None:
        return "\n".join(str(turn["content"]) for turn in prompt) + "\n", completion + end
    asked = opened.get(id(prompt))
    if asked is None:
        asked = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        opened[id(prompt)] = asked
    turn = {"role": "assistant", "content": completion}
    whole = str(tokenizer.apply_chat_template([*prompt, turn], tokenize=False))
    # Where the template writes the past otherwise than the open turn, the reply starts at the difference.
    differs = (k for k, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b)
    cut = next(differs, min(len(asked), len(whole)))
    return whole[:cut], whole[cut:]


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token this tokenizer puts before every text, if it does."""
    start = tokenizer.bos_token_id
    ids = tokenizer.encode("a")
    return cast(int, start) if start is not None and ids[:1] == [start] else None


def pack_replies(
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    prompt_of: Sequence[int] | None,
    *,
    padding: int | None,
    token_budget: int,
    together: Sequence[int] | None = None,
    share_prefix: bool = True,
) -> list[PackedBatch]:
    """Pack so that `last_index` is the position `transformers` reads (see the module's docstring).

    Replies with the same number in `together` land in the same batch. UserError for an empty prompt with an empty
    reply.
    """
    prompts = list(prompt_ids)
    owner = list(range(len(completion_ids))) if prompt_of is None else list(prompt_of)
    kept: list[list[int]] = []
    for i, ids in enumerate(completion_ids):
        prompt = prompts[owner[i]]
        if not prompt and not ids:
            raise UserError(f"reward model: prompt {owner[i]} and its reply {i} are both empty")
        kept.append(_without_padding(ids, padding))
        if not prompt or (not kept[i] and prompt[-1] == padding):
            row = _without_padding(prompt + ids, padding) or [cast(int, padding)]
            owner[i] = len(prompts)
            prompts.append(row[:1])
            kept[i] = row[1:]
    return pack(
        prompts,
        kept,
        prompt_of=owner,
        token_budget=token_budget,
        share_prefix=share_prefix,
        keep_last=True,
        together=together,
    )


def _without_padding(ids: list[int], padding: int | None) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == padding:
        end -= 1
    return ids[:end]
