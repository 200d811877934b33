"""The reward of the step benchmark. Imports nothing, so that the peer's Python can use the same function."""


def even_digits(completions: list[str], **_: object) -> list[float]:
    """The share of even digits among the characters of each completion."""
    return [sum(map(text.count, "02468")) / max(1, len(text)) for text in completions]
