"""Curves over steps: as inline SVG, and as the data from which `templates/chart.js` zooms and says what is under the
pointer. Without scripts, and on paper, the SVG stands for itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from markupsafe import Markup

from pyralis.train.report.format import loss_text
from pyralis.train.report.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    Scale,
    chart_dot,
    chart_line,
    chart_path,
    chart_text,
    nice_ticks,
)

DRAWN_POINTS, KEPT_POINTS = 500, 2000
"""Longer curves are thinned out: to so many points in the SVG, where more would not be seen, and in the data."""
LABEL_GAP = 20
Number: TypeAlias = Literal["loss", "rate", "percent", "reward"]
"""How values are written."""


@dataclass(frozen=True, slots=True)
class Pane:
    """A strip of a chart with a y axis of its own: `low` at its bottom, `high` at its top, in the SVG's units.

    ticks: the values that are marked; None: round ones. fixed: the axis stays as it is when x is zoomed.
    """

    top: float
    bottom: float
    low: float
    high: float
    number: Number
    ticks: tuple[float, ...] | None = None
    fixed: bool = False

    @property
    def scale(self) -> Scale:
        return Scale(self.low, self.high, self.bottom, self.top)


@dataclass(frozen=True, slots=True)
class Curve:
    """(step, value) by step; NaN where a value is not finite.

    Attributes:
        kind: its CSS classes.
        english, chinese: its name under the pointer.
        dots: "all": mark each point; "tips": only tooltips for pages without scripts.
        labelled: the last value stands at its end.
        near: under the pointer, the nearest point is named where there is none at the very step.
        marked: a dot follows the pointer.
        run: of a comparison, the run it belongs to.
    """

    kind: str
    english: str
    chinese: str
    points: Sequence[tuple[int, float]]
    pane: int = 0
    dots: Literal["all", "tips"] | None = None
    labelled: bool = False
    near: bool = False
    marked: bool = False
    run: int | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """data: what `chart.js` reads; no text of the user's is in it but the names of curves."""

    svg: Markup
    data: dict[str, Any]


def line_chart(label: str, panes: Sequence[Pane], curves: Sequence[Curve], breaks: Sequence[int] = ()) -> Chart:
    """All curves over the same steps. label: what a screen reader says. breaks: steps that get a line from top to
    bottom of the first pane."""
    steps = [step for curve in curves for step, _ in (*curve.points[:1], *curve.points[-1:])] or [0]
    x = Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    bottom = panes[-1].bottom
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + 26:g}" role="img" aria-label="{label}">']
    parts.append('<g class="whole">')
    for pane in panes:
        parts += _axis(pane)
    whole = [v for v in nice_ticks(x.low, x.high, 8) if v == int(v)]
    parts += [chart_text("tick middle", x(v), bottom + 18, f"{v:.0f}") for v in whole]
    parts += [chart_line("broken", x(step), panes[0].top, x(step), panes[0].bottom) for step in breaks]
    drawn = [thinned(curve.points, DRAWN_POINTS) for curve in curves]
    for curve, points in zip(curves, drawn):
        y = panes[curve.pane].scale
        parts.append(chart_path(curve.kind, [(x(step), y(value)) for step, value in points]))
    for curve, points in zip(curves, drawn):
        parts += _dots(curve, points, x, panes[curve.pane])
    parts += _end_labels(curves, x, panes)
    return Chart(Markup("".join(parts) + "</g></svg>"), _data(x, panes, curves, breaks))


def thinned(points: Sequence[tuple[int, float]], limit: int) -> Sequence[tuple[int, float]]:
    """At most `limit` points: the first, the last, and of each stretch between the lowest and the highest, so that no
    peak is lost. What is not finite counts as a peak."""
    if len(points) <= limit:
        return points
    inner, stretches = len(points) - 2, (limit - 2) // 2
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(1 + i * inner // stretches, 1 + (i + 1) * inner // stretches)
        kept |= {find(stretch, key=lambda j: _height(points[j][1])) for find in (min, max)}
    return [points[i] for i in sorted(kept)]


def _height(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def loss_range(losses: Sequence[float]) -> tuple[float, float]:
    """Of a y axis: from the least to the greatest finite one, with some air, and not below 0 for losses."""
    finite = [v for v in losses if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def value_text(value: float, number: Number) -> str:
    """As under the pointer."""
    if number == "percent":
        return f"{value:.0%}"
    return loss_text(value) if number == "loss" else f"{value:.3g}" if number == "reward" else f"{value:.2e}"


def _tick_text(value: float, number: Number) -> str:
    if number == "percent":
        return f"{value:.0%}"
    if number == "rate":
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"
    return f"{value:.4g}"


def _axis(pane: Pane) -> Iterator[str]:
    """Lines across the chart at round values, and these beside it."""
    y = pane.scale
    for value in nice_ticks(pane.low, pane.high, 6) if pane.ticks is None else pane.ticks:
        yield chart_line("grid", LEFT, y(value), WIDTH - RIGHT, y(value))
        yield chart_text("tick end", LEFT - 8, y(value) + 4, _tick_text(value, pane.number))


def _dots(curve: Curve, points: Sequence[tuple[int, float]], x: Scale, pane: Pane) -> Iterator[str]:
    few = len(curve.points) < 3 and curve.dots is not None
    kind = curve.kind if curve.dots == "all" else f"point {'lone' if few else ''}".strip()
    for step, value in points if curve.dots is not None else ():
        if math.isfinite(value):
            tip = f"step {step}: {value_text(value, pane.number)}"
            yield chart_dot(kind, x(step), pane.scale(value), tip)


def _end_labels(curves: Sequence[Curve], x: Scale, panes: Sequence[Pane]) -> Iterator[str]:
    """The last values beside their curves, moved apart where they would overlap."""
    ends = sorted(
        (panes[c.pane].scale(c.points[-1][1]), c.kind, value_text(c.points[-1][1], panes[c.pane].number))
        for c in curves
        if c.labelled and c.points and math.isfinite(c.points[-1][1])
    )
    places = [place for place, _, _ in ends]
    if len(places) == 2 and (overlap := LABEL_GAP - (places[1] - places[0])) > 0:
        places = [places[0] - overlap / 2, places[1] + overlap / 2]
    for place, (_, kind, text) in zip(places, ends):
        yield chart_text(f"value {kind}", x.end + 8, place + 4, text)


def _data(x: Scale, panes: Sequence[Pane], curves: Sequence[Curve], breaks: Sequence[int]) -> dict[str, Any]:
    kept = [(curve, thinned(curve.points, KEPT_POINTS)) for curve in curves]
    return {
        "x": {"first": x.low, "last": x.high, "left": x.start, "right": x.end},
        "panes": [
            {
                "top": p.top, "bottom": p.bottom, "low": p.low, "high": p.high, "number": p.number, "ticks": p.ticks,
                "fixed": p.fixed,
            }
            for p in panes
        ],
        "curves": [
            {
                "kind": c.kind, "name": [c.english, c.chinese], "pane": c.pane, "dots": c.dots == "all",
                "labelled": c.labelled, "near": c.near, "marked": c.marked, "run": c.run,
                "steps": [step for step, _ in points],
                "values": [float(f"{value:.6g}") if math.isfinite(value) else None for _, value in points],
            }
            for c, points in kept
        ],
        "breaks": list(breaks),
    }  # fmt: skip
