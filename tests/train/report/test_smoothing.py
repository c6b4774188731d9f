"""The smoothed loss curve."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from pyralis.train.report.metric_rows import StepMetrics
from pyralis.train.report.smoothing import smooth_losses


def test_a_constant_stays_and_noise_shrinks(make_step: Callable[..., StepMetrics]) -> None:
    assert smooth_losses([make_step(i, 2.0) for i in range(1, 50)]) == pytest.approx([2.0] * 49)
    noisy = smooth_losses([make_step(i, 2.0 + (-1) ** i) for i in range(1, 501)])
    assert max(abs(v - 2.0) for v in noisy[20:-20]) < 0.1


def test_a_slope_does_not_lag(make_step: Callable[..., StepMetrics]) -> None:
    smoothed = smooth_losses([make_step(i, 0.01 * i) for i in range(1, 501)])
    assert smoothed[250] == pytest.approx(2.51, abs=1e-6)


def test_windows_count_by_their_steps(make_step: Callable[..., StepMetrics]) -> None:
    long, short = make_step(100, 1.0, window_steps=100), make_step(101, 3.0, window_steps=1)
    assert abs(smooth_losses([long, short])[0] - 1.0) < abs(smooth_losses([long, short])[1] - 3.0)


def test_what_is_not_finite_stays_apart(make_step: Callable[..., StepMetrics]) -> None:
    smoothed = smooth_losses([make_step(1, 1.0), make_step(2, math.nan), make_step(3, 1.0), make_step(4, math.inf)])
    assert [math.isnan(v) for v in smoothed] == [False, True, False, True]
    assert (smoothed[0], smoothed[2]) == pytest.approx((1.0, 1.0))
    assert smooth_losses([]) == []
