"""Pieces of the pages' charts as inline SVG, and the histogram of lengths. Colours come from the pages' style sheet, by
class.

All text in them is made here from numbers, so that the result is safe to put into a page as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, LEFT, RIGHT = 800, 48, 78


@dataclass(frozen=True, slots=True)
class LengthBin:
    """How many rows have a length in [start, end) tokens."""

    start: int
    end: int
    count: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * gap for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def length_chart(bins: Sequence[LengthBin]) -> Markup:
    """A histogram of row lengths in tokens."""
    bottom, height = 150, 174
    x = Scale(bins[0].start, bins[-1].end, LEFT, WIDTH - 8)
    y = Scale(0, max(b.count for b in bins) or 1, bottom, 12)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="rows by length in tokens">']
    for value in (v for v in nice_ticks(0, y.high, 3) if v == int(v)):
        parts.append(chart_line("grid", LEFT, y(value), WIDTH - 8, y(value)))
        parts.append(chart_text("tick end", LEFT - 8, y(value) + 4, f"{value:,.0f}"))
    for b in bins:
        tip = f"<title>{b.start:,} to {b.end - 1:,} tokens: {b.count:,} rows</title>"
        size = f'width="{max(x(b.end) - x(b.start) - 1, 1):.1f}" height="{bottom - y(b.count):.1f}"'
        parts.append(f'<rect class="length" x="{x(b.start)}" y="{y(b.count)}" {size} rx="1">{tip}</rect>')
    parts += [chart_text("tick middle", x(v), bottom + 18, f"{v:,.0f}") for v in nice_ticks(x.low, x.high, 8)]
    return Markup("".join(parts) + "</svg>")


def chart_path(kind: str, points: Sequence[tuple[float, float]]) -> str:
    """A line through the points, interrupted where one is not finite."""
    commands, pen = [], "M"
    for px, py in points:
        if math.isfinite(py):
            commands.append(f"{pen}{px:g} {py:g}")
        pen = "L" if math.isfinite(py) else "M"
    return f'<path class="{kind}" d="{"".join(commands)}"/>' if len(commands) > 1 else ""


def chart_line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def chart_text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{text}</text>'


def chart_dot(kind: str, x: float, y: float, tip: str) -> str:
    return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="3.5"><title>{tip}</title></circle>'
