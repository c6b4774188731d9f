"""The rewards of a preference run: chosen and rejected above, accuracy below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyralis.train.report.chart import Chart, Curve, Pane, line_chart
from pyralis.train.report.metric_rows import Metric, StepMetrics


def reward_chart(metrics: Sequence[Metric]) -> Chart | None:
    """None where no rewards were logged."""
    steps = [m for m in metrics if isinstance(m, StepMetrics) and m.reward_margin is not None]
    if not steps:
        return None
    chosen, rejected, accuracy = (
        [(m.step, _value(m, name)) for m in steps] for name in ("chosen", "rejected", "accuracy")
    )
    finite = [v for _, v in (*chosen, *rejected) if math.isfinite(v)] or [0.0]
    air = 0.06 * (max(finite) - min(finite)) or 0.1
    panes = (
        Pane(12, 262, min(finite) - air, max(finite) + air, "reward"),
        Pane(290, 340, 0.0, 1.0, "percent", ticks=(0.0, 0.5, 1.0), fixed=True),
    )
    curves = (
        Curve("chosen", "chosen", "优选", chosen, dots="tips", labelled=True, marked=True),
        Curve("rejected", "rejected", "劣选", rejected, labelled=True, marked=True),
        Curve("rate", "accuracy", "准确率", accuracy, pane=1),
    )
    return line_chart("rewards by step", panes, curves)


def _value(row: StepMetrics, name: str) -> float:
    value: float | None = getattr(row, f"reward_{name}")
    return math.nan if value is None else value
