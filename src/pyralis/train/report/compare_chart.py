"""The losses of several runs in one chart; the page's style sheet colours the classes r0, r1, ..."""

from __future__ import annotations

from collections.abc import Sequence

from pyralis.train.report.chart import Chart, Curve, Pane, line_chart, loss_range
from pyralis.train.report.compare import Run
from pyralis.train.report.metric_rows import EvalMetrics, StepMetrics
from pyralis.train.report.smoothing import smooth_losses


def training_chart(runs: Sequence[Run]) -> Chart:
    """Smoothed, as in the report."""
    points = []
    for run in runs:
        steps = [m for m in run.metrics if isinstance(m, StepMetrics)]
        points.append([(m.step, loss) for m, loss in zip(steps, smooth_losses(steps))])
    return _chart("training loss by step", runs, points)


def evaluation_chart(runs: Sequence[Run]) -> Chart | None:
    """Of the runs that were evaluated; None where none was."""
    points = [[(m.step, m.loss) for m in run.metrics if isinstance(m, EvalMetrics)] for run in runs]
    return _chart("evaluation loss by step", runs, points, dots=True) if any(points) else None


def _chart(
    label: str, runs: Sequence[Run], points: Sequence[Sequence[tuple[int, float]]], *, dots: bool = False
) -> Chart:
    """All runs on the same axes. dots: mark each point, for evaluations, which are few."""
    low, high = loss_range([loss for own in points for _, loss in own])
    curves = [
        Curve(
            *(f"run r{index}", run.name, run.name, own), near=True, marked=True, run=index,
            dots="all" if dots or len(own) < 3 else None,
        )
        for index, (run, own) in enumerate(zip(runs, points))
        if own
    ]  # fmt: skip
    return line_chart(label, [Pane(12, 262, low, high, "loss")], curves)
