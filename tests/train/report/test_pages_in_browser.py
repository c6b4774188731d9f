"""The report and the comparison in a real browser: no errors, nothing fetched, values under the pointer, zoom."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyralis.train.report.compare import read_runs
from pyralis.train.report.compare_page import write_comparison
from pyralis.train.report.metric_rows import Metric
from pyralis.train.report.run_report import ReportInfo, write_report
from tests.browser import Browser, browser, needs_chromium
from tests.train.report.test_compare import make_run
from tests.train.report.test_run_report import info

__all__ = ["info", "make_run"]
pytestmark = needs_chromium
AREA = "#loss-chart .area"
SHOWN = "getComputedStyle(document.querySelector('{}')).display !== 'none'"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def report(page: Browser, info: ReportInfo, tmp_path: Path) -> Iterator[Browser]:
    page.errors.clear()
    page.requests.clear()
    write_report(tmp_path / "report.html", info)
    page.open(tmp_path / "report.html")
    yield page
    assert page.errors == []
    assert page.requests == [(tmp_path / "report.html").as_uri()]


def drag(page: Browser, selector: str, first: float, last: float) -> None:
    """Over a chart, from one share of its width to another."""
    box = page.place(selector)
    y = box["y"] + box["height"] / 3
    xs = [box["x"] + share * box["width"] for share in (first, (first + last) / 2, last)]
    page.mouse("mouseMoved", xs[0], y)
    page.mouse("mousePressed", xs[0], y, 1)
    for x in xs[1:]:
        page.mouse("mouseMoved", x, y, 1)
    page.mouse("mouseReleased", xs[-1], y, 1)


def is_zoomed(page: Browser, chart: str = "loss-chart") -> bool:
    found: bool = page.run(f"document.querySelector('#{chart} svg').classList.contains('zoomed')")
    return found


def ticks(page: Browser, kind: str) -> list[float]:
    texts = page.run(f"[...document.querySelectorAll('#loss-chart .part .tick.{kind}')].map((e) => e.textContent)")
    return [float(text) for text in texts]


def test_what_is_under_the_pointer(report: Browser) -> None:
    box = report.place(AREA)
    report.mouse("mouseMoved", box["x"] + box["width"] * (48 + 688 / 2) / 800, box["y"] + 40)
    tip = report.run("document.querySelector('#loss-chart .tip').innerText").split("\n")
    assert tip[:4] == ["step", "20", "loss", "0.7134"] or tip[:4] == ["step", "21", "loss", "0.6883"]
    assert "learning rate" in tip
    assert report.run(SHOWN.format("#loss-chart .rule"))
    box = "((name) => document.querySelector(`#loss-chart .${name}`).getBoundingClientRect())"
    assert report.run(f"{box}('tip').top >= {box}('zoom').bottom")
    report.mouse("mouseMoved", 2, 2)
    assert not report.run(SHOWN.format("#loss-chart .tip"))


def test_dragging_zooms_and_y_follows(report: Browser) -> None:
    assert not is_zoomed(report)
    drag(report, AREA, 0.5, 0.8)
    assert is_zoomed(report)
    steps, losses = ticks(report, "middle"), ticks(report, "end")
    assert 18 < min(steps) < max(steps) < 36
    assert max(losses[:-2]) < 1.0  # the whole run goes up to 2.8; the last two are the learning rate's
    assert not report.run(SHOWN.format("#loss-chart .whole"))
    ends = report.run("[...document.querySelectorAll('#loss-chart .part path')].map((e) => e.getBBox().x)")
    assert min(ends) >= 47.9
    report.mouse("mouseMoved", 2, 2)
    box = report.place(AREA)
    for clicks in (1, 2):
        report.mouse("mousePressed", box["x"] + 300, box["y"] + 50, clicks)
        report.mouse("mouseReleased", box["x"] + 300, box["y"] + 50, clicks)
    assert not is_zoomed(report)
    assert report.run(SHOWN.format("#loss-chart .whole"))


def test_a_click_is_no_drag(report: Browser) -> None:
    report.click(AREA)
    assert not is_zoomed(report)


def test_buttons_and_keys_zoom(report: Browser) -> None:
    zoom_in, zoom_out, left, right, whole = (f"#loss-chart .zoom button:nth-of-type({n})" for n in range(1, 6))
    disabled = "[...document.querySelectorAll('#loss-chart .zoom button')].map((e) => e.disabled)"
    assert report.run(disabled) == [False, True, True, True, True]
    report.click(zoom_in)
    assert report.run(disabled) == [False] * 5
    before = ticks(report, "middle")
    report.click(left)
    assert ticks(report, "middle")[0] < before[0]
    report.click(right)
    assert ticks(report, "middle") == before
    report.click(zoom_out)
    assert not is_zoomed(report)
    report.press("+")  # the button just clicked is disabled now, and has handed the focus on
    assert is_zoomed(report)
    report.press("Escape")
    assert not is_zoomed(report)
    for _ in range(40):
        report.press("+")
    steps = ticks(report, "middle")
    assert is_zoomed(report)
    assert steps
    report.click(whole)
    assert not is_zoomed(report)


def test_it_is_printed_unzoomed(report: Browser) -> None:
    drag(report, AREA, 0.5, 0.8)
    assert report.printed().startswith(b"%PDF")
    report.send("Emulation.setEmulatedMedia", media="print")
    assert report.run(SHOWN.format("#loss-chart .whole"))
    assert not report.run(SHOWN.format("#loss-chart .part"))
    assert not report.run(SHOWN.format("#loss-chart .zoom"))
    report.send("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_sticks_out(report: Browser, width: int) -> None:
    report.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    assert report.run("document.documentElement.scrollWidth") <= width


def test_both_languages(report: Browser) -> None:
    report.click("label[for=lang-zh]")
    assert report.run("document.querySelector('.verdict').innerText").startswith("经过")
    assert "拖动可放大" in report.run("document.querySelector('.zoom').innerText")
    report.click("label[for=lang-en]")
    assert "drag to zoom" in report.run("document.querySelector('.zoom').innerText")


def test_runs_compared(
    page: Browser, make_run: Callable[..., Path], make_step: Callable[..., Any], tmp_path: Path
) -> None:
    other: list[Metric] = [make_step(step, 9.0 - step / 10) for step in range(1, 41)]
    write_comparison(tmp_path / "compare.html", read_runs([make_run("a"), make_run("b", other)]))
    page.errors.clear()
    page.open(tmp_path / "compare.html")
    box = page.place("#training .area")
    page.mouse("mouseMoved", box["x"] + box["width"] / 2, box["y"] + 40)
    tip = page.run("document.querySelector('#training .tip').innerText").split("\n")
    assert tip[0::2] == ["step", "a", "b"]
    drag(page, "#training .area", 0.4, 0.6)
    assert is_zoomed(page, "training")
    assert not is_zoomed(page, "evaluation")
    tallest = (
        "Math.max(...[...document.querySelectorAll('#training .part .tick.end')].map((e) => Number(e.textContent)))"
    )
    assert page.run(tallest) >= 6
    page.click("label:has(#show-1)")  # y follows what is seen
    assert page.run(tallest) < 1.5
    assert page.errors == []
    assert json.loads(page.run("JSON.stringify([...document.querySelectorAll('.part path.r1')].length)")) == 0
