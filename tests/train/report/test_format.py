"""Numbers as a person reads them."""

from __future__ import annotations

import math

import pytest

from pyralis.train.report.format import count_text, duration_text, gib_text, loss_text, number_of, percent_text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (7.5, "7.50"), (999, "999"), (999.6, "1.00k"), (1234, "1.23k"), (45678, "45.7k"),
     (999_900, "1.00M"), (7_615_616_512, "7.62B"), (1.5e13, "15.0T"), (math.nan, "nan")],
)  # fmt: skip
def test_counts(number: float, text: str) -> None:
    assert count_text(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (9.99, "10.0 s"), (59.7, "1:00"), (65, "1:05"), (3725, "1:02:05"), (90061, "1d 1:01:01"),
     (None, "?"), (math.inf, "?")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("loss", "text"),
    [(1.23456, "1.2346"), (12.3456, "12.346"), (0.00123, "0.0012"), (3.2e-5, "3.2e-05"), (0.0, "0.0000"),
     (math.nan, "nan"), (-math.inf, "-inf"), (None, "-")],
)  # fmt: skip
def test_losses(loss: float | None, text: str) -> None:
    assert loss_text(loss) == text


def test_memory_shares_and_plurals() -> None:
    assert [gib_text(x) for x in (None, 0.456, 17.93)] == ["-", "0.46 GiB", "17.9 GiB"]
    assert [percent_text(x) for x in (0.0, 0.00042, 0.0351, 0.65, 1.0)] == ["0 %", "0.042 %", "3.5 %", "65 %", "100 %"]
    assert [number_of(n, "step") for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
