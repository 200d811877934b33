"""What the process of a peer says: JSON lines on its standard output and nothing else there.

Importing this sends whatever libraries print to standard error, so it is imported before them.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def answer(found: dict[str, Any]) -> None:
    """One line, at once."""
    _answers.write(json.dumps(found) + "\n")
    _answers.flush()


def check_tokens(tokenizer: Any, text: str, token_ids: Sequence[int]) -> None:
    """ValueError where the peer's tokenizer reads a prompt otherwise than the side that made its token ids."""
    found = tokenizer.encode(text, add_special_tokens=False)
    if list(found) != list(token_ids):
        raise ValueError(f"tokenizer of the peer: {text!r} became {found}, not {list(token_ids)}")
