"""Smoothing of loss curves, the same for the picture and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyralis.train.report.metric_rows import StepMetrics

SPAN = 0.02
"""The share of the run over which the weight of a loss falls to 1/e, on either side."""


def smooth_losses(rows: Sequence[StepMetrics]) -> list[float]:
    """Losses averaged with their neighbours, each weighted by its window's steps; NaN where the loss is not finite.

    The mean of an exponential average forwards and one backwards, so that the curve does not lag behind the losses.
    """
    if not rows:
        return []
    span = max(SPAN * rows[-1].step, 1.0)
    forwards = _exponential_average(rows, span)
    backwards = reversed(_exponential_average(rows[::-1], span))
    return [(a + b) / 2 for a, b in zip(forwards, backwards)]


def _exponential_average(rows: Sequence[StepMetrics], span: float) -> list[float]:
    averages, value, weight = [], 0.0, 0.0
    for row in rows:
        if not math.isfinite(row.loss):
            averages.append(math.nan)
            continue
        keep = math.exp(-row.window_steps / span)
        value, weight = keep * value + (1 - keep) * row.loss, keep * weight + (1 - keep)
        averages.append(value / weight)
    return averages
