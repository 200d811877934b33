"""Flags: from the words of a command line to (name, words), and from words to values."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from grpo_fast.config.schema import COMMAND_LINE, SPECIAL, Schema, convert
from grpo_fast.errors import UserError


def split(argv: list[str], schema: Schema) -> list[tuple[str, list[str]]]:
    """[(name with underscores, words after it)]; UserError for a flag that is none."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            name, negated = _known_flag(flag, schema)
            flags.append((name, ["false"] * negated + [value] * bool(equals)))
        elif not flags:
            raise UserError(f"unexpected argument {word!r}: settings are given as --section.field value")
        else:
            flags[-1][1].append(word)
    return flags


def _known_flag(flag: str, schema: Schema) -> tuple[str, bool]:
    """(name, whether it is the `no-` form of a switch)."""
    if any(flag.startswith(name + ".") and flag != name + "." for name in schema.mappings):
        return flag, False
    name = flag.replace("-", "_")
    if name in schema.kinds or name in SPECIAL:
        return name, False
    head, dot, last = name.rpartition(".")
    positive = head + dot + last.removeprefix("no_")
    if last.startswith("no_") and (schema.kinds.get(positive) is bool or positive == "dry_run"):
        return positive, True
    raise UserError(f"unknown flag --{flag}{schema.hint(name).replace('_', '-').replace('mean ', 'mean --')}")


def one_path(special: dict[str, list[str]], name: str) -> Path | None:
    words = special.get(name)
    if words is None:
        return None
    if len(words) != 1 or not words[0]:
        raise UserError(f"--{name} takes one path, got {' '.join(words) or 'none'}")
    path = Path(words[0])
    try:
        path.exists()
    except OSError as error:
        raise UserError(f"--{name} {path}: {error.strerror}") from None
    return path


def take_flag(values: dict[str, tuple[Any, str]], name: str, words: list[str], schema: Schema) -> None:
    for mapping in schema.mappings:
        if name.startswith(mapping + "."):
            given = values.get(mapping, ({}, ""))[0]
            key, kind = name.removeprefix(mapping + "."), get_args(schema.kinds[mapping])[1]
            values[mapping] = (
                given | {key: convert(from_words(words, kind), kind, name, COMMAND_LINE)},
                COMMAND_LINE,
            )
            return
    kind = schema.kinds[name]
    values[name] = (convert(from_words(words, kind), kind, name, COMMAND_LINE), COMMAND_LINE)


def from_words(words: list[str], kind: Any) -> Any:
    """What TOML would have held; a word that does not fit stays a text, for `_convert` to refuse."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if [word.lower() for word in words] == ["none"] else from_words(words, inner[0])
    if origin is tuple:
        return [from_words([word], inner[0]) for word in words if words != [""]]
    if origin is dict:
        pairs = [word.rpartition("=")[::2] for word in words]
        if words and len(words) % 2 == 0 and not any("=" in word for word in words):
            pairs = list(zip(words[::2], words[1::2], strict=True))
        return {key: from_words([value], inner[1]) for key, value in pairs}
    if kind is bool:
        text = " ".join(words).lower()
        return True if text in ("", "true", "1", "yes") else False if text in ("false", "0", "no") else text
    text = words[0] if len(words) == 1 else words
    try:
        return kind(text) if kind in (int, float) and isinstance(text, str) else text
    except ValueError:
        return text
