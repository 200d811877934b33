"""What the pages share: their templates, and how figures are written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup

from grpo_fast.run.progress import duration, si
from grpo_fast.shown import plain_text

LARGEST = 1e100
"""Of the numbers in charts: sums and squares of them are still numbers."""


def page_template(name: str, *folders: Path) -> Template:
    """A template of `folders` or of this one. It escapes every string and takes control characters out of it."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.filters.update(figure=figure, signed=signed, interval=interval, duration=duration, si=si)
    return environment.get_template(name)


def figure(value: float | None) -> str:
    """A number of the text, three decimals: what summary.json says, rounded; – for what is none."""
    if not isinstance(value, int | float):
        return "–"
    text = f"{value:.3f}".replace("-", "−")
    return "0.000" if text == "−0.000" else text


def signed(value: float | None) -> str:
    """`figure` with its sign."""
    text = figure(value)
    return text if text in ("–", "0.000") or text.startswith("−") else f"+{text}"


def interval(measured: Mapping[str, Any] | None, sign: bool = False) -> str:
    """The 95% interval of `{"mean", "ci95"}` as "0.412 to 0.468"."""
    ci95 = (measured or {}).get("ci95")
    return " to ".join((signed if sign else figure)(end) for end in ci95) if ci95 else ""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one that a chart can place: of a size that can be drawn, and no bool, text or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) <= LARGEST


def _clean(value: Any) -> Any:
    return plain_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
