"""Prompts: from a file or the hub to token ids.

`read_rows` does everything that needs no model, so that a bad file is refused before one is loaded;
`tokenize` does the rest. Every message names the file and the line (or the row, where the format has no
lines).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_fast.data.records import one_line, read_records
from grpo_fast.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A prompt as the file has it, the row's other columns, and where it stands."""

    prompt: str | Messages
    columns: dict[str, Any]
    where: str

    @property
    def plain(self) -> str:
        """The prompt's text; of chat messages, the last one's."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model."""

    text: str
    """What the model reads: the chat template is already applied where there are messages."""
    token_ids: list[int]
    messages: Messages | None
    columns: dict[str, Any]
    """The other columns of the row, for reward functions and reports."""

    @property
    def plain(self) -> str:
        """What was asked: the text, or the last chat message's, without template."""
        return self.messages[-1]["content"] if self.messages else self.text


def read_rows(source: str, *, prompt_column: str = "prompt", split: str = "train") -> list[Row]:
    """The rows of a .jsonl, .json, .parquet or .csv file, or of a hub data set (`id` or `id:subset`).

    A row's prompt is a text or a list of chat messages in `prompt_column`; where that column is absent and
    `messages` is there, it is taken. A final answer in the messages is left out of the prompt.

    Raises `UserError` for a file that is missing, empty or broken, an absent column, and a prompt that is
    empty or neither text nor messages.
    """
    try:
        rows = [_row(columns, prompt_column, where) for where, columns in read_records(source, split=split)]
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"prompts file {source} has no rows")
    return rows


def tokenize(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int | None = None,
    system_prompt: str = "",
) -> list[Prompt]:
    """Applies the chat template where there are messages, and encodes.

    A plain text goes in as it is, with the tokenizer's own special tokens; `system_prompt` turns it into a
    chat. Raises `UserError` for a prompt of more than `max_prompt_tokens` tokens or of none, and where a
    template is needed and the tokenizer has none or refuses the messages.
    """
    rows = list(rows)
    chats = [as_messages(row.prompt, system_prompt) for row in rows]
    texts = [
        row.plain if chat is None else _apply_template(tokenizer, chat, row.where)
        for row, chat in zip(rows, chats, strict=True)
    ]
    ids: list[list[int]] = [[] for _ in rows]
    for is_chat in (False, True):  # a template writes the special tokens itself
        chosen = [index for index, chat in enumerate(chats) if (chat is not None) == is_chat]
        if chosen:
            encoded = tokenizer([texts[index] for index in chosen], add_special_tokens=not is_chat)
            for index, token_ids in zip(chosen, encoded["input_ids"], strict=True):
                ids[index] = list(token_ids)
    for row, token_ids in zip(rows, ids, strict=True):
        if not token_ids:
            raise UserError(f"{row.where}: the prompt has no tokens: the tokenizer does not know its text")
        if max_prompt_tokens is not None and len(token_ids) > max_prompt_tokens:
            raise UserError(
                f"{row.where}: the prompt has {len(token_ids)} tokens, more than "
                f"data.max_prompt_tokens = {max_prompt_tokens}"
            )
    return [
        Prompt(text, token_ids, chat, row.columns)
        for text, token_ids, chat, row in zip(texts, ids, chats, rows, strict=True)
    ]


def spaced(rows: list[Row], size: int) -> list[Row]:
    """`size` rows at even distances (all of them where there are no more), whatever order the file has."""
    return rows if size >= len(rows) else [rows[index * len(rows) // size] for index in range(size)]


def hold_out(rows: list[Row], size: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): `size` evenly spaced ones, and none of their prompts in training.

    Raises `UserError` when nothing would be left to train on.
    """
    held = spaced(rows, size)
    seen = {json.dumps(row.prompt) for row in held}
    training = [row for row in rows if json.dumps(row.prompt) not in seen]
    if not training:
        raise UserError(
            f"data.eval_size = {size} held-out prompts leave none of the {len(rows)} to train on: lower it, "
            "or give data.eval_prompts"
        )
    return training, held


# ---- rows ----


def _row(columns: dict[str, Any], prompt_column: str, where: str) -> Row:
    name = prompt_column if prompt_column in columns or "messages" not in columns else "messages"
    if name not in columns:
        there = ", ".join(map(str, columns)) or "none"
        hint = did_you_mean(name, map(str, columns))
        raise UserError(
            one_line(f"{where}: no column {name!r} (data.prompt_column), there are {there}{hint}")
        )
    value = checked_prompt(columns[name], where, name)
    return Row(value, {key: item for key, item in columns.items() if key != name}, where)


def checked_prompt(value: Any, where: str, name: str) -> str | Messages:
    """`value` as a prompt: a text, or messages without their final answers; UserError at `where` otherwise."""
    if isinstance(value, str):
        check_text(value, where, name)
        return value
    if not isinstance(value, list) or not value:
        got = json.dumps(value, default=str)
        raise UserError(one_line(f"{where}: {name} must be a text or a list of chat messages, got {got}"))
    messages = checked_messages(value, where, name)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where}: {name} has no user's message to answer")
    return messages


def checked_messages(value: list[Any], where: str, name: str) -> Messages:
    """Chat messages, each with a role and a content that is text; only a user's must not be empty."""
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: {name}[{index}] must be a message with role and content")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise UserError(f"{where}: role and content of {name}[{index}] must be texts")
        check_text(message["content"], where, f"{name}[{index}].content", empty=message["role"] != "user")
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def check_text(text: str, where: str, name: str, *, empty: bool = False) -> None:
    """UserError for a text that cannot be encoded, and for an empty one unless `empty` allows it."""
    if not text.strip() and not empty:
        raise UserError(f"{where}: {name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name} has half of a surrogate pair, character {error.start + 1}, which is no text"
        ) from None


def as_messages(prompt: str | Messages, system_prompt: str) -> Messages | None:
    """The chat a prompt becomes, None where it stays a plain text."""
    if isinstance(prompt, str):
        if not system_prompt:
            return None
        prompt = [{"role": "user", "content": prompt}]
    if system_prompt and prompt[0]["role"] != "system":
        return [{"role": "system", "content": system_prompt}, *prompt]
    return prompt


def _apply_template(tokenizer: PreTrainedTokenizerBase, chat: Messages, where: str) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: chat messages or a system prompt need a chat template, which the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} has not: give plain prompts or another model"
        )
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise UserError(one_line(f"{where}: the chat template refuses the messages: {error}")) from None
