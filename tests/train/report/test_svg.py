"""Ticks, and the histogram of lengths."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyralis.train.report.svg import LengthBin, length_chart, nice_ticks


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
    bars = [e for e in ElementTree.fromstring(chart).iter("rect") if e.get("class") == "length"]
    heights = [float(bar.get("height") or -1) for bar in bars]
    assert heights[1] == pytest.approx(4 * heights[0])
    assert heights[2] == 0
    assert bars[1][0].text == "64 to 127 tokens: 12 rows"
