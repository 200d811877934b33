"""Small charts as inline SVG: no library, no script, colours from the page's CSS variables.

Every chart is drawn in a box of 400 × 210 and scales with its column, so its text stays readable from a phone
to a wide screen.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from grpo_fast.shown import plain_text

WIDTH, HEIGHT = 400, 210
_LITTLE = 1e-200  # differences below this would vanish in what is computed from them
_TOP, _BOTTOM, _LEFT = 10, 24, 50
_MOST_POINTS, _MOST_OF_MANY = (
    160,
    48,
)  # points of a line, alone or among many; longer ones are averaged in bins


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    """Written at the line's end when the chart has several."""
    x: Sequence[float]
    """Steps, rising."""
    y: Sequence[float | None]
    """Values; None is a gap."""
    colour: str
    """CSS colour."""
    spread: Sequence[float | None] | None = None
    """Half width of the band around the line."""
    marks: bool = False
    """Few measurements: dots joined by a dashed line."""


def line_chart(
    series: Sequence[Series], label: str, *, floor: float | None = None, events: Sequence[float] = ()
) -> Markup:
    """Lines over steps with bands, a light grid and names at the lines' ends.

    `label` is read out by screen readers; `floor` is a value that the vertical axis must reach down to, `events` are
    steps that are marked by an upright line.
    """
    most = _MOST_POINTS if len(series) <= 2 else _MOST_OF_MANY
    lines = [_binned(line, most) for line in series]
    values = [v for line in lines for v in _extent(line)] + ([] if floor is None else [floor])
    named = len(lines) > 1
    right = 12 + (6.8 * max(len(_shortened(line.name)) for line in lines) if named else 0)
    frame = _Frame([x for line in lines for x in line.x], values, right)
    parts = [frame.axes(), *(frame.event(step) for step in events if frame.x0 <= step <= frame.x1)]
    for line in lines:
        points = [frame.point(x, y) for x, y in zip(line.x, line.y, strict=True)]
        if line.spread is not None:
            parts += [_band(frame, line, start, stop) for start, stop in _runs(line.y)]
        for start, stop in _runs(line.y):
            path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points[start:stop])
            dash = " stroke-dasharray='3 3'" if line.marks else ""
            parts.append(f"<path class='line' d='{path}' stroke='{escape(line.colour)}'{dash}/>")
        shown = range(len(points)) if line.marks else [stop - 1 for _, stop in _runs(line.y)[-1:]]
        for i in shown:
            if line.y[i] is not None:
                x, y = points[i]
                look = f"class='mark' stroke='{escape(line.colour)}' r='3.2'"
                look = look if line.marks else f"fill='{escape(line.colour)}' r='2.6'"
                parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' {look}/>")
    if named:
        parts.append(_end_labels(frame, lines))
    return _svg(parts, label)


def stacked_chart(
    names: Sequence[str], x: Sequence[float], layers: Sequence[Sequence[float]], label: str
) -> Markup:
    """Areas on top of one another, the first at the bottom, in the tones `--tone-0`, `--tone-1`, …"""
    binned = [
        _binned(Series(name=n, x=x, y=y, colour=""), _MOST_POINTS) for n, y in zip(names, layers, strict=True)
    ]
    steps = binned[0].x
    edges = [[0.0] * len(steps)]
    for layer in binned:
        edges.append([below + (y or 0.0) for below, y in zip(edges[-1], layer.y, strict=True)])
    frame = _Frame(steps, [0.0, *edges[-1]], 12)
    parts = [frame.axes()]
    for i, (below, above) in enumerate(itertools.pairwise(edges)):
        outline = [frame.point(s, v) for s, v in zip(steps, above, strict=True)]
        outline += [frame.point(s, v) for s, v in reversed(list(zip(steps, below, strict=True)))]
        path = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in outline) + "Z"
        parts.append(f"<path d='{path}' fill='var(--tone-{i % 8})'/>")
    return _svg(parts, label)


def scatter_chart(points: Sequence[tuple[float, float]], label: str, *, across: str, colour: str) -> Markup:
    """Dots at (x, y), at least one; `across` names the horizontal axis in a few letters."""
    frame = _Frame([x for x, _ in points], [y for _, y in points], 12)
    parts = [frame.axes(across)]
    for x, y in (frame.point(*point) for point in points):
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.4' fill='{escape(colour)}' opacity='0.5'/>")
    return _svg(parts, label)


def reliability_chart(bins: Sequence[tuple[float, float, int]], label: str, *, colour: str) -> Markup:
    """(predicted, observed, n) of each bin, at least one, and the diagonal on which they should lie.

    A dot's area grows with its bin.
    """
    ends = [value for predicted, observed, _ in bins for value in (predicted, observed)]
    low, high = min(ends), max(ends)
    frame = _Frame([low, high], [low, high], 12)
    (x0, y0), (x1, y1) = frame.point(low, low), frame.point(high, high)
    parts = [
        frame.axes("score"),
        f"<line class='diagonal' x1='{x0:.1f}' y1='{y0:.1f}' x2='{x1:.1f}' y2='{y1:.1f}'/>",
    ]
    places = [frame.point(predicted, observed) for predicted, observed, _ in bins]
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f"<path class='line' d='{path}' stroke='{escape(colour)}'/>")
    largest = max(n for *_, n in bins) or 1
    for (x, y), (*_, n) in zip(places, bins, strict=True):
        radius = max(1.5, 4.5 * math.sqrt(n / largest))
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:.1f}' fill='{escape(colour)}'/>")
    return _svg(parts, label)


def heat_map(names: Sequence[str], values: Sequence[Sequence[float | None]], label: str) -> Markup:
    """Correlations (R, R) within -1 and 1, one row a name: `--c0` above zero, `--c1` below, stronger is denser."""
    left, top, cell = 116, 60, 26
    width = min(72.0, (WIDTH - left - 70) / len(names))
    parts = []
    for i, name in enumerate(names):
        y, x = top + cell * i, left + width * (i + 0.5)
        parts.append(f"<text x='{left - 8}' y='{y + 17}' text-anchor='end'>{escape(_shortened(name))}</text>")
        turned = f"transform='rotate(-32 {x:.1f} {top - 7})'"
        parts.append(f"<text x='{x:.1f}' y='{top - 7}' {turned}>{escape(_shortened(name))}</text>")
        for j, value in enumerate(values[i]):
            place = f"x='{left + width * j:.1f}' y='{y}' width='{width - 2:.1f}' height='{cell - 2}' rx='3'"
            if value is None or i == j:
                parts.append(f"<rect {place} fill='var(--grid)'/>")
                continue
            colour = "var(--c0)" if value >= 0 else "var(--c1)"
            parts.append(f"<rect {place} fill='{colour}' opacity='{0.06 + 0.5 * abs(value):.2f}'/>")
            if width >= 26:
                middle = left + width * (j + 0.5) - 1
                text = f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # no minus before 0.00
                parts.append(
                    f"<text class='value' x='{middle:.1f}' y='{y + 16}' text-anchor='middle'>{text}</text>"
                )
    return _svg(parts, label, height=top + cell * len(names) + 6)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high (both within, high > low), as near to `count` of them as can be."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    choices = []
    for step in (m * power for m in (0.5, 1, 2, 2.5, 5, 10)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        choices.append([i * step for i in range(first, last + 1)])
    return min(choices, key=lambda marks: abs(len(marks) - count))


def tick_text(value: float, step: float) -> str:
    """A tick's number: as many decimals as the ticks' distance needs, powers of ten when tiny or huge."""
    if abs(value) < step * 1e-6:
        return "0"
    if step < 2e-4 or abs(value) >= 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, decimals) != round(step, decimals + 1):  # 0.25, 2.5
        decimals += 1
    return f"{value:.{decimals}f}".replace("-", "−")


class _Frame:
    """The axes of a chart and the way from data to its box."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], right: float) -> None:
        self.x0, self.x1 = min(xs), max(xs)
        if self.x1 == self.x0:
            self.x0, self.x1 = self.x0 - 1, self.x1 + 1
        low, high = min(ys), max(ys)
        span, size = high - low, abs(high)
        room = 0.06 * span if span > _LITTLE else 0.1 * size if size > _LITTLE else 1.0
        self.y0 = low if low == 0 else low - room
        self.y1 = high + room
        self.left, self.right = _LEFT, WIDTH - right

    def point(self, x: float, y: float | None) -> tuple[float, float]:
        across = (x - self.x0) / (self.x1 - self.x0)
        up = ((y if y is not None else self.y0) - self.y0) / (self.y1 - self.y0)
        return self.left + across * (self.right - self.left), HEIGHT - _BOTTOM - up * (
            HEIGHT - _BOTTOM - _TOP
        )

    def event(self, step: float) -> str:
        x = self.point(step, self.y0)[0]
        bottom = HEIGHT - _BOTTOM
        return (
            f"<line class='event' x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{bottom}'/>"
            f"<path class='event-head' d='M{x - 4:.1f},{_TOP}h8l-4,6z'/>"
        )

    def axes(self, across: str = "step") -> str:
        parts = []
        marks = ticks(self.y0, self.y1)
        for value in marks:
            y = self.point(self.x0, value)[1]
            text = tick_text(value, marks[1] - marks[0] if len(marks) > 1 else abs(value) or 1.0)
            parts.append(
                f"<line class='grid' x1='{self.left}' x2='{self.right:.0f}' y1='{y:.1f}' y2='{y:.1f}'/>"
            )
            parts.append(f"<text x='{self.left - 6}' y='{y + 3.5:.1f}' text-anchor='end'>{text}</text>")
        count = max(2, round((self.right - self.left) / 65))
        marks = ticks(self.x0, self.x1, count)
        if across == "step":
            marks = [value for value in marks if value == round(value)]
        for value in marks:
            x = self.point(value, self.y0)[0]
            text = f"{value:g}" if abs(value) < 1e4 else f"{value / 1000:g}k"
            text = text.replace("-", "−")
            parts.append(f"<text x='{x:.1f}' y='{HEIGHT - 7}' text-anchor='middle'>{text}</text>")
        parts.append(f"<text x='{self.left - 6}' y='{HEIGHT - 7}' text-anchor='end'>{escape(across)}</text>")
        return "".join(parts)


def _extent(line: Series) -> list[float]:
    spread = line.spread or [0.0] * len(line.y)
    pairs = [(y, s or 0.0) for y, s in zip(line.y, spread, strict=True) if y is not None]
    return [y + sign * s for y, s in pairs for sign in (-1, 1)]


def _runs(values: Sequence[float | None]) -> list[tuple[int, int]]:
    """[start, stop) of each stretch without a gap."""
    runs, start = [], None
    for i, value in enumerate([*values, None]):
        if value is not None and start is None:
            start = i
        elif value is None and start is not None:
            runs.append((start, i))
            start = None
    return runs


def _binned(line: Series, most: int) -> Series:
    """At most `most` points: means of equal stretches; the half width of a mean of k is that of one
    over the root of k, as standard errors of separate batches combine."""
    count = len(line.x)
    if count <= most:
        return line
    edges = [round(i * count / most) for i in range(most + 1)]
    bins = [range(a, b) for a, b in itertools.pairwise(edges)]

    def mean(values: Sequence[float | None], where: range) -> float | None:
        there = [v for v in (values[i] for i in where) if v is not None]
        return sum(there) / len(there) if there else None

    def root_mean(values: Sequence[float | None], where: range) -> float | None:
        there = [v for v in (values[i] for i in where) if v is not None]
        return math.sqrt(sum(v * v for v in there)) / len(there) if there else None

    return Series(
        name=line.name,
        x=[mean(line.x, where) or 0.0 for where in bins],
        y=[mean(line.y, where) for where in bins],
        colour=line.colour,
        spread=None if line.spread is None else [root_mean(line.spread, where) for where in bins],
        marks=line.marks,
    )


def _band(frame: _Frame, line: Series, start: int, stop: int) -> str:
    around = [(x, y or 0.0, s or 0.0) for x, y, s in zip(line.x, line.y, line.spread or [], strict=True)][
        start:stop
    ]
    outline = [frame.point(x, y + s) for x, y, s in around]
    outline += [frame.point(x, y - s) for x, y, s in reversed(around)]
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in outline) + "Z"
    return f"<path d='{path}' fill='{escape(line.colour)}' opacity='0.16'/>"


def _end_labels(frame: _Frame, lines: Sequence[Series]) -> str:
    """The names beside the lines' last points, pushed apart where they would overlap."""
    ends = []
    for line in lines:
        last = next((y for y in reversed(line.y) if y is not None), None)
        if last is not None:
            ends.append((frame.point(frame.x1, last)[1], line))
    ends.sort(key=lambda end: end[0])
    height = 13.0
    places = [y for y, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + height)
    if places:
        places[-1] = min(places[-1], HEIGHT - _BOTTOM)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - height)
    return "".join(
        f"<text class='name' x='{frame.right + 7:.0f}' y='{y + 3.5:.1f}' style='fill:{escape(line.colour)}'>"
        f"{escape(_shortened(line.name))}</text>"
        for y, (_, line) in zip(places, ends, strict=True)
    )


def _shortened(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _svg(parts: Sequence[str], label: str, *, height: int = HEIGHT) -> Markup:
    drawing = (
        f"<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{escape(label)}'>{''.join(parts)}</svg>"
    )
    return Markup(plain_text(drawing))  # every piece of text in the parts is escaped or a number
