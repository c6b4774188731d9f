"""The report's charts: well-formed, inside their frame, true to the numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyralis.train.report.metric_rows import EvalMetrics, Metric, StepMetrics
from pyralis.train.report.svg import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    LengthBin,
    length_chart,
    loss_chart,
    loss_points,
    nice_ticks,
    thin,
)


def elements(chart: str, name: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(chart).iter(name) if kind in (e.get("class") or "").split()]


def places(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.e+]+) ([-\d.e+]+)", path.get("d") or "")]


def test_curves_follow_the_losses(history: list[Metric]) -> None:
    chart = loss_chart(history)
    (raw,) = elements(chart, "path", "raw")
    ys = [y for _, y in places(raw)]
    assert len(ys) == 40
    assert ys == sorted(ys)  # the loss falls, and y goes down the page
    assert len(elements(chart, "circle", "eval")) == 4
    for path in ElementTree.fromstring(chart).iter("path"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(path))
    tips = [e.text for e in ElementTree.fromstring(chart).iter("title")]
    assert "step 40: loss 0.5175" in tips
    assert "step 40: eval loss 0.6175" in tips


def test_end_labels_stay_apart(make_step: Callable[..., StepMetrics]) -> None:
    rows = [make_step(1, 5.0), make_step(2, 1.0), EvalMetrics(2, 1.0, 1.0001, 2.7, None, None)]
    a, b = (float(e.get("y") or 0) for e in elements(loss_chart(rows), "text", "value"))
    assert abs(a - b) >= 17.9


def test_what_is_not_finite_breaks_the_line(make_step: Callable[..., StepMetrics]) -> None:
    losses = [3.0, 2.5, math.nan, 2.0, math.inf, 1.0, 0.5]
    rows = [make_step(i + 1, loss) for i, loss in enumerate(losses)]
    chart = loss_chart(rows)
    (raw,) = elements(chart, "path", "raw")
    assert (raw.get("d") or "").count("M") == 3
    assert len(elements(chart, "line", "broken")) == 2
    assert not re.search(r"nan|inf", re.sub("<title>.*?</title>", "", chart))
    assert [p["loss"] for p in loss_points(rows)] == [3.0, 2.5, None, 2.0, None, 1.0, 0.5]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_shortest_runs(make_step: Callable[..., StepMetrics], count: int) -> None:
    chart = loss_chart([make_step(i + 1, 2.0, learning_rate=0.0) for i in range(count)])
    assert len(elements(chart, "circle", "lone")) == count


def test_long_runs_are_thinned_out(make_step: Callable[..., StepMetrics]) -> None:
    rows = [make_step(i + 1, 1.0) for i in range(10_000)]
    points = loss_points(rows)
    assert len(points) == MAX_POINTS
    assert (points[0]["step"], points[-1]["step"]) == (1, 10_000)
    assert thin(rows[:7]) == list(range(7))


def test_points_carry_the_evaluation_at_their_step(history: list[Metric]) -> None:
    points = {p["step"]: p for p in loss_points(history)}
    assert points[9]["eval"] is None
    assert points[10]["eval"] == next(m.loss for m in history if isinstance(m, EvalMetrics))


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_round_and_within(low: float, span: float, about: int) -> None:
    high = low + span
    ticks = nice_ticks(low, high, about)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert all(low - slack <= t <= high + slack for t in ticks)
    assert len(ticks) <= about + 1
    if len(ticks) > 1:
        digits = f"{(ticks[-1] - ticks[0]) / (len(ticks) - 1):.3e}"[0]
        assert digits in "1259"  # 9: 1 a rounding error below


def test_ticks_of_a_single_value() -> None:
    assert nice_ticks(3.0, 3.0) == [3.0]


def test_lengths() -> None:
    chart = length_chart([LengthBin(0, 64, 3), LengthBin(64, 128, 12), LengthBin(128, 192, 0)])
    bars = elements(chart, "rect", "length")
    heights = [float(bar.get("height") or -1) for bar in bars]
    assert heights[1] == pytest.approx(4 * heights[0])
    assert heights[2] == 0
    assert bars[1][0].text == "64 to 127 tokens: 12 rows"
