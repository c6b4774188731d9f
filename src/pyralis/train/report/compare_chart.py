"""The losses of several runs in one chart, as inline SVG; the page's style sheet colours the classes r0, r1, ..."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pyralis.train.report.compare import Run
from pyralis.train.report.format import loss_text
from pyralis.train.report.metric_rows import EvalMetrics, StepMetrics
from pyralis.train.report.smoothing import smooth_losses
from pyralis.train.report.svg import (
    LEFT,
    LOSS_BOTTOM,
    RIGHT,
    WIDTH,
    Scale,
    chart_dot,
    chart_path,
    loss_axis,
    loss_scale,
    step_axis,
    thin,
)

HEIGHT = LOSS_BOTTOM + 28


@dataclass(frozen=True, slots=True)
class Curve:
    """(step, loss) of the run with this index; NaN where a loss is not finite."""

    run: int
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """An SVG, and under the pointer: {"run", "x", "y", "step", "loss"} of each point, x and y in the SVG's units."""

    svg: Markup
    points: list[dict[str, float | int]]


def training_curves(runs: Sequence[Run]) -> list[Curve]:
    """Smoothed, as in the report."""
    curves = []
    for index, run in enumerate(runs):
        steps = [m for m in run.metrics if isinstance(m, StepMetrics)]
        smoothed = smooth_losses(steps)
        curves.append(Curve(index, [(steps[i].step, smoothed[i]) for i in thin(steps)]))
    return curves


def evaluation_curves(runs: Sequence[Run]) -> list[Curve]:
    """Only of runs that were evaluated."""
    found = [
        Curve(i, [(m.step, m.loss) for m in run.metrics if isinstance(m, EvalMetrics)]) for i, run in enumerate(runs)
    ]
    return [curve for curve in found if curve.points]


def compare_chart(curves: Sequence[Curve], *, dots: bool = False) -> Chart:
    """All curves on the same axes. dots: mark each point, for evaluations, which are few."""
    x, y = _axes(curves)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">']
    parts += loss_axis(y) + step_axis(x, LOSS_BOTTOM)
    points: list[dict[str, float | int]] = []
    for curve in curves:
        kind = f"run r{curve.run}"
        parts.append(chart_path(kind, [(x(step), y(loss)) for step, loss in curve.points]))
        for step, loss in curve.points:
            if not math.isfinite(loss):
                continue
            if dots or len(curve.points) < 3:
                parts.append(chart_dot(kind, x(step), y(loss), f"step {step}: {loss_text(loss)}"))
            points.append({"run": curve.run, "x": x(step), "y": y(loss), "step": step, "loss": loss})
    return Chart(Markup("".join(parts) + "</svg>"), points)


def _axes(curves: Sequence[Curve]) -> tuple[Scale, Scale]:
    steps = [step for curve in curves for step, _ in curve.points] or [0]
    y = loss_scale([loss for curve in curves for _, loss in curve.points])
    return Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT), y
