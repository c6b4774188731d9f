"""The losses of a run: raw, smoothed and of the evaluation, above the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyralis.train.report.chart import Chart, Curve, Pane, line_chart, loss_range
from pyralis.train.report.metric_rows import EvalMetrics, Metric, StepMetrics
from pyralis.train.report.smoothing import smooth_losses


def loss_chart(metrics: Sequence[Metric]) -> Chart | None:
    """None where no step was logged."""
    steps = [m for m in metrics if isinstance(m, StepMetrics)]
    evals = [m for m in metrics if isinstance(m, EvalMetrics)]
    if not steps:
        return None
    low, high = loss_range([m.loss for m in steps] + [m.loss for m in evals])
    highest = max((m.learning_rate for m in steps if math.isfinite(m.learning_rate)), default=0.0) or 1.0
    panes = (
        Pane(12, 262, low, high, "loss"),
        Pane(290, 340, 0.0, highest, "rate", ticks=(0.0, highest), fixed=True),
    )
    raw = [(m.step, m.loss) for m in steps]
    curves = [
        Curve("raw", "loss", "损失", raw, dots="tips"),
        Curve(
            *("train", "smoothed", "平滑", [(m.step, s) for m, s in zip(steps, smooth_losses(steps))]),
            marked=True, labelled=True,
        ),
        Curve("eval", "evaluation", "评估", [(m.step, m.loss) for m in evals], dots="all", labelled=True),
        Curve("rate", "learning rate", "学习率", [(m.step, m.learning_rate) for m in steps], pane=1),
    ]  # fmt: skip
    broken = [m.step for m in steps if not math.isfinite(m.loss)]
    return line_chart("loss by step", panes, [c for c in curves if c.points], broken)
