"""The charts of the report as inline SVG. Colours come from the page's style sheet, by class.

All text in them is made here from numbers, so that the result is safe to put into a page as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pyralis.train.report.format import loss_text
from pyralis.train.report.metric_rows import EvalMetrics, Metric, StepMetrics
from pyralis.train.report.smoothing import smooth_losses

WIDTH, LEFT, RIGHT = 800, 48, 64
LOSS_TOP, LOSS_BOTTOM, RATE_TOP, RATE_BOTTOM, HEIGHT = 12, 262, 290, 340, 366
MAX_POINTS = 500
"""Longer runs are thinned out to so many points: more would not be seen."""


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


def thin(rows: Sequence[StepMetrics], limit: int = MAX_POINTS) -> list[int]:
    """Indices of at most `limit` rows, evenly spread, the first and the last among them."""
    if len(rows) <= limit:
        return list(range(len(rows)))
    return sorted({round(i * (len(rows) - 1) / (limit - 1)) for i in range(limit)})


def loss_points(metrics: Sequence[Metric]) -> list[dict[str, float | int | None]]:
    """What the page shows under the pointer: step, losses and rate, with positions in the chart's own units."""
    steps, evals, x, y = _scales(metrics)
    smoothed = smooth_losses(steps)
    points: list[dict[str, float | int | None]] = [
        {
            "step": steps[i].step,
            "x": x(steps[i].step),
            "y": y(smoothed[i]) if math.isfinite(smoothed[i]) else None,
            "loss": steps[i].loss if math.isfinite(steps[i].loss) else None,
            "smooth": smoothed[i] if math.isfinite(smoothed[i]) else None,
            "lr": steps[i].learning_rate,
            "eval": None,
        }
        for i in thin(steps)
    ]
    by_step = {p["step"]: p for p in points}
    for row in evals:
        if row.step in by_step and math.isfinite(row.loss):
            by_step[row.step]["eval"] = row.loss
    return points


def loss_chart(metrics: Sequence[Metric]) -> Markup:
    """Raw, smoothed and evaluation loss above the learning rate. Without scripts the points still have tooltips."""
    steps, evals, x, y = _scales(metrics)
    highest = max((m.learning_rate for m in steps if math.isfinite(m.learning_rate)), default=0.0) or 1.0
    rate = Scale(0.0, highest, RATE_BOTTOM, RATE_TOP)
    shown, smoothed = [steps[i] for i in thin(steps)], smooth_losses(steps)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">']
    parts += loss_axis(y)
    for value in (0.0, highest):
        parts.append(chart_line("grid", LEFT, rate(value), WIDTH - RIGHT, rate(value)))
        parts.append(chart_text("tick end", LEFT - 8, rate(value) + 4, _rate_text(value)))
    parts += step_axis(x, RATE_BOTTOM)
    parts.append(chart_path("raw", [(x(m.step), y(m.loss)) for m in shown]))
    parts.append(chart_path("train", [(x(steps[i].step), y(smoothed[i])) for i in thin(steps)]))
    parts.append(chart_path("eval", [(x(m.step), y(m.loss)) for m in evals]))
    parts.append(chart_path("rate", [(x(m.step), rate(m.learning_rate)) for m in shown]))
    for row in shown:
        if math.isfinite(row.loss):
            lone = " lone" if len(shown) < 3 else ""
            parts.append(
                chart_dot(f"point{lone}", x(row.step), y(row.loss), f"step {row.step}: loss {loss_text(row.loss)}")
            )
        else:
            parts.append(chart_line("broken", x(row.step), LOSS_TOP, x(row.step), LOSS_BOTTOM))
    for measured in evals:
        if math.isfinite(measured.loss):
            tip = f"step {measured.step}: eval loss {loss_text(measured.loss)}"
            parts.append(chart_dot("eval", x(measured.step), y(measured.loss), tip))
    parts.append(_end_labels(steps, evals, x, y))
    return Markup("".join(parts) + "</svg>")


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


def _scales(metrics: Sequence[Metric]) -> tuple[list[StepMetrics], list[EvalMetrics], Scale, Scale]:
    steps = [m for m in metrics if isinstance(m, StepMetrics)]
    evals = [m for m in metrics if isinstance(m, EvalMetrics)]
    places = [m.step for m in steps] + [m.step for m in evals] or [0]
    y = loss_scale([m.loss for m in steps] + [m.loss for m in evals])
    return steps, evals, Scale(min(places), max(places), LEFT, WIDTH - RIGHT), y


def loss_scale(losses: Sequence[float]) -> Scale:
    """The y axis of losses: from their least to their greatest finite one, with some air, and not below 0 for none."""
    finite = [v for v in losses if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(max(low - margin, 0.0) if low >= 0 else low - margin, high + margin, LOSS_BOTTOM, LOSS_TOP)


def loss_axis(y: Scale) -> list[str]:
    """Lines across the chart at round losses, and these beside it."""
    parts = []
    for value in nice_ticks(y.low, y.high, 6):
        parts.append(chart_line("grid", LEFT, y(value), WIDTH - RIGHT, y(value)))
        parts.append(chart_text("tick end", LEFT - 8, y(value) + 4, f"{value:.4g}"))
    return parts


def step_axis(x: Scale, bottom: float) -> list[str]:
    """Whole steps below the chart."""
    whole = [v for v in nice_ticks(x.low, x.high, 8) if v == int(v)]
    return [chart_text("tick middle", x(v), bottom + 18, f"{v:.0f}") for v in whole]


def _end_labels(steps: Sequence[StepMetrics], evals: Sequence[EvalMetrics], x: Scale, y: Scale) -> str:
    """The last values beside their curves, moved apart where they would overlap."""
    ends = [
        (kind, y(last.loss), loss_text(last.loss))
        for kind, last in (("train", steps[-1] if steps else None), ("eval", evals[-1] if evals else None))
        if last is not None and math.isfinite(last.loss)
    ]
    ends.sort(key=lambda end: end[1])
    if len(ends) == 2 and (overlap := 18 - (ends[1][1] - ends[0][1])) > 0:
        ends = [
            (*ends[0][:1], ends[0][1] - overlap / 2, ends[0][2]),
            (*ends[1][:1], ends[1][1] + overlap / 2, ends[1][2]),
        ]
    return "".join(chart_text(f"value {kind}", x.end + 8, place + 4, text) for kind, place, text in ends)


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


def _rate_text(value: float) -> str:
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"
