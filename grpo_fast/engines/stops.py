"""Stop strings: has the text that a row's newest token completes just reached one of them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""A tokenizer's way from token ids to text."""
MARGIN = 4
"""Tokens decoded before those that a stop string can span: a character's first bytes, and the space that some
tokenizers take off the front."""


class StopStrings:
    """Watches one completion. Each token costs one decode of a bounded tail, however long the completion is.

    Every token that has a text adds at least one byte to it, so a string of L bytes lies within the last L of them.
    """

    def __init__(self, strings: Sequence[str], decode: Decode) -> None:
        self.strings = strings
        self.decode = decode
        self.reach = MARGIN + max(len(string.encode()) for string in strings)
        self.tail: list[int] = []
        self.text = ""

    def ends_with(self, token: int) -> bool:
        """Take the next token; whether the text up to it now holds a stop string."""
        text = self.decode([*self.tail, token])
        if text == self.text and not text.endswith("\ufffd"):
            return False  # a special token: no text, and none to push out of the tail
        self.tail.append(token)
        if len(self.tail) < 2 * self.reach:
            self.text = text
        else:
            self.tail = self.tail[-self.reach :]
            self.text = self.decode(self.tail)
        return any(string in text for string in self.strings)
