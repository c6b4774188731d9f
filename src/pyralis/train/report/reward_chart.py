"""The rewards of a preference run as inline SVG: chosen and rejected above, accuracy below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from pyralis.train.report.format import percent_text
from pyralis.train.report.metric_rows import Metric, StepMetrics
from pyralis.train.report.svg import (
    HEIGHT,
    LEFT,
    LOSS_BOTTOM,
    LOSS_TOP,
    RATE_BOTTOM,
    RATE_TOP,
    RIGHT,
    WIDTH,
    Scale,
    chart_dot,
    chart_line,
    chart_path,
    chart_text,
    nice_ticks,
    thin,
)


def reward_chart(metrics: Sequence[Metric]) -> Markup | None:
    """None where no rewards were logged."""
    steps = [m for m in metrics if isinstance(m, StepMetrics) and m.reward_margin is not None]
    if not steps:
        return None
    shown = [steps[i] for i in thin(steps)]
    chosen, rejected, accuracy = ([_value(m, name) for m in shown] for name in ("chosen", "rejected", "accuracy"))
    finite = [v for v in (*chosen, *rejected) if math.isfinite(v)] or [0.0]
    margin = 0.06 * (max(finite) - min(finite)) or 0.1
    x = Scale(shown[0].step, shown[-1].step, LEFT, WIDTH - RIGHT)
    y = Scale(min(finite) - margin, max(finite) + margin, LOSS_BOTTOM, LOSS_TOP)
    share = Scale(0.0, 1.0, RATE_BOTTOM, RATE_TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="rewards by step">']
    for scale, ticks, text in ((y, nice_ticks(y.low, y.high, 6), "{:.3g}"), (share, [0.0, 0.5, 1.0], "{:.0%}")):
        for value in ticks:
            parts.append(chart_line("grid", LEFT, scale(value), WIDTH - RIGHT, scale(value)))
            parts.append(chart_text("tick end", LEFT - 8, scale(value) + 4, text.format(value)))
    whole = [v for v in nice_ticks(x.low, x.high, 8) if v == int(v)]
    parts += [chart_text("tick middle", x(v), RATE_BOTTOM + 18, f"{v:.0f}") for v in whole]
    places = [x(m.step) for m in shown]
    for kind, values, scale in (("chosen", chosen, y), ("rejected", rejected, y), ("rate", accuracy, share)):
        parts.append(chart_path(kind, [(place, scale(v)) for place, v in zip(places, values)]))
    for place, row, c, r, a in zip(places, shown, chosen, rejected, accuracy):
        tip = f"step {row.step}: chosen {c:.3g}, rejected {r:.3g}, margin {c - r:.3g}, {percent_text(a)} right"
        if math.isfinite(c):
            parts.append(chart_dot("point", place, y(c), tip))
    for kind, values in (("chosen", chosen), ("rejected", rejected)):
        if math.isfinite(values[-1]):
            parts.append(chart_text(f"value {kind}", x.end + 8, y(values[-1]) + 4, f"{values[-1]:.3g}"))
    return Markup("".join(parts) + "</svg>")


def _value(row: StepMetrics, name: str) -> float:
    value: float | None = getattr(row, f"reward_{name}")
    return math.nan if value is None else value
