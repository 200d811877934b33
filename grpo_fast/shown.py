"""Text of others, made fit to be shown: nothing in it acts on a terminal, and no secret of an address is repeated.

Prompts, completions, names, files, servers' answers and the messages about them all go through here: what is printed
through `plain_text` or `run/terminal.py`, errors through `UserError`, pages through `report/template.py`.
"""

from __future__ import annotations

import re

LONGEST = 1000
"""Characters of an error's line; of a longer one the middle is left out."""

_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f"
    "\ud800-\udfff"  # lone surrogates, which no output encoding takes
    "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"  # direction and line marks
)
_KEPT = re.compile(_OBEYED.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
_IN_ADDRESS = re.compile(r"(?<=//)[^/\s@'\"<>]+@")
_IN_QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:token|key|secret|password|passwd|signature|credential)|sig|auth|pwd)=)[^&;\s'\"<>]+",
    re.IGNORECASE,
)


def plain_text(text: str, *, one_line: bool = False) -> str:
    """The text without anything a terminal obeys: escape sequences, control and direction characters.

    Newlines and tabs stay, or become spaces with `one_line`.
    """
    if one_line:
        return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))
    return _KEPT.sub("\N{REPLACEMENT CHARACTER}", text)


def without_secrets(text: str) -> str:
    """The text with user and password of every address in it, and keys and tokens of its query, hidden."""
    return _IN_QUERY.sub(r"\1[hidden]", _IN_ADDRESS.sub("[hidden]@", text))


def error_line(message: object) -> str:
    """What is said of an error: one plain line of readable length, without secrets."""
    text = str(message)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} … {text[-LONGEST // 4 :]}"
    return plain_text(without_secrets(text), one_line=True)
