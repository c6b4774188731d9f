"""The charts: well-formed, inside their frame, true to the numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from pyralis.train.report.chart import DRAWN_POINTS, KEPT_POINTS, Chart, thinned
from pyralis.train.report.loss_chart import loss_chart
from pyralis.train.report.metric_rows import EvalMetrics, Metric, StepMetrics
from pyralis.train.report.reward_chart import reward_chart
from pyralis.train.report.svg import WIDTH

MakeStep = Callable[..., StepMetrics]


def elements(chart: Chart, name: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(chart.svg).iter(name) if kind in (e.get("class") or "").split()]


def places(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.e+]+) ([-\d.e+]+)", path.get("d") or "")]


def losses(rows: list[Metric]) -> Chart:
    chart = loss_chart(rows)
    assert chart is not None
    return chart


def test_curves_follow_the_losses(history: list[Metric]) -> None:
    chart = losses(history)
    (raw,) = elements(chart, "path", "raw")
    ys = [y for _, y in places(raw)]
    assert len(ys) == 40
    assert ys == sorted(ys)  # the loss falls, and y goes down the page
    assert len(elements(chart, "circle", "eval")) == 4
    for path in ElementTree.fromstring(chart.svg).iter("path"):
        assert all(0 <= x <= WIDTH and 0 <= y <= 366 for x, y in places(path))
    tips = [e.text for e in ElementTree.fromstring(chart.svg).iter("title")]
    assert "step 40: 0.5175" in tips
    assert "step 40: 0.6175" in tips


def test_the_data_is_what_is_drawn(history: list[Metric]) -> None:
    data = losses(history).data
    assert data["x"] == {"first": 1, "last": 40, "left": 48, "right": 722}
    assert [curve["kind"] for curve in data["curves"]] == ["raw", "train", "eval", "rate"]
    assert data["curves"][2]["steps"] == [10, 20, 30, 40]
    assert data["curves"][0]["values"][-1] == pytest.approx(0.517519, abs=1e-6)
    assert data["panes"][1]["ticks"] == (0.0, pytest.approx(9.75e-5))


def test_end_labels_stay_apart(make_step: MakeStep) -> None:
    rows: list[Metric] = [make_step(1, 5.0), make_step(2, 1.0), EvalMetrics(2, 1.0, 1.0001, 2.7, None, None)]
    a, b = (float(e.get("y") or 0) for e in elements(losses(rows), "text", "value"))
    assert abs(a - b) >= 17.9


def test_what_is_not_finite_breaks_the_line(make_step: MakeStep) -> None:
    rows: list[Metric] = [
        make_step(i + 1, loss) for i, loss in enumerate([3.0, 2.5, math.nan, 2.0, math.inf, 1.0, 0.5])
    ]
    chart = losses(rows)
    (raw,) = elements(chart, "path", "raw")
    assert (raw.get("d") or "").count("M") == 3
    assert len(elements(chart, "line", "broken")) == 2
    assert not re.search(r"nan|inf", re.sub("<title>.*?</title>", "", chart.svg))
    assert chart.data["curves"][0]["values"] == [3.0, 2.5, None, 2.0, None, 1.0, 0.5]
    assert chart.data["breaks"] == [3, 5]


@pytest.mark.parametrize("count", [1, 2])
def test_the_shortest_runs(make_step: MakeStep, count: int) -> None:
    chart = losses([make_step(i + 1, 2.0, learning_rate=0.0) for i in range(count)])
    assert len(elements(chart, "circle", "lone")) == count


def test_a_run_without_steps_has_no_chart() -> None:
    assert loss_chart([]) is None
    assert reward_chart([]) is None


def test_long_runs_are_thinned_out_and_keep_their_peaks(make_step: MakeStep) -> None:
    values = [1.0 + 0.1 * math.sin(i) for i in range(10_000)]
    values[5003], values[7001] = 9.0, math.nan
    chart = losses([make_step(i + 1, value) for i, value in enumerate(values)])
    (raw,) = elements(chart, "path", "raw")
    assert len(places(raw)) <= DRAWN_POINTS
    kept = dict(zip(chart.data["curves"][0]["steps"], chart.data["curves"][0]["values"]))
    assert KEPT_POINTS * 0.9 < len(kept) <= KEPT_POINTS
    assert {1, 5004, 7002, 10_000} <= kept.keys()
    assert (kept[5004], kept[7002]) == (9.0, None)
    assert thinned([(1, 1.0), (2, 2.0)], 3) == [(1, 1.0), (2, 2.0)]


def test_rewards(make_step: MakeStep) -> None:
    rows: list[Metric] = [
        make_step(i, 0.6, reward_chosen=i / 10, reward_rejected=-i / 10, reward_margin=i / 5, reward_accuracy=i / 4)
        for i in range(1, 5)
    ]
    chart = reward_chart(rows)
    assert chart is not None
    assert [curve["kind"] for curve in chart.data["curves"]] == ["chosen", "rejected", "rate"]
    assert [e.text for e in elements(chart, "text", "value")] == ["0.4", "-0.4"]
    assert "100%" in [e.text for e in elements(chart, "text", "tick")]
