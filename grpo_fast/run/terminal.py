"""The console of every command, to which what it prints is text and nothing else."""

from typing import IO, Any

from rich.console import Console
from rich.text import Text

from grpo_fast.shown import plain_text


def replace_unprintable(file: IO[str]) -> None:
    """Characters that the encoding of `file` lacks are written as question marks from now on."""
    if hasattr(file, "reconfigure"):
        file.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


class Terminal(Console):
    """A console without markup and emoji codes, which no string reaches with control characters in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich calls for each string that is printed, also in a table's cells and titles."""
        return super().render_str(plain_text(text), **options)
