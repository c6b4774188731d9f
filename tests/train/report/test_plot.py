"""The loss picture."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from pyralis.train.report.metric_rows import Metric, StepMetrics
from pyralis.train.report.plot import EVAL, TRAIN, plot_loss


def has_colour(picture: Path, colour: str) -> bool:
    pixels = np.asarray(imread(picture))[..., :3] * 255
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels - wanted).max(axis=-1) < 2).any())


def test_it_draws_both_curves_and_leaves_nothing_else(tmp_path: Path, history: list[Metric]) -> None:
    before = dict(matplotlib.rcParams)
    plot_loss(history, tmp_path / "new" / "loss.png", "a title")
    picture = tmp_path / "new" / "loss.png"
    assert imread(picture).shape[:2] == (1000, 1600)
    assert has_colour(picture, TRAIN)
    assert has_colour(picture, EVAL)
    assert list(picture.parent.iterdir()) == [picture]
    assert dict(matplotlib.rcParams) == before


def test_a_failed_drawing_keeps_the_older_picture(tmp_path: Path, history: list[Metric]) -> None:
    picture = tmp_path / "loss.png"
    plot_loss(history, picture)
    older = picture.read_bytes()
    (tmp_path / "loss.png.tmp").mkdir()
    with pytest.raises(OSError, match="tmp"):
        plot_loss(history[:5], picture)
    assert picture.read_bytes() == older


@pytest.mark.parametrize("title", [None, "cost in $ and $", "模型 sft", "\N{GRINNING FACE} \N{MONGOLIAN DIGIT ZERO}"])
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_no_title_and_no_length_makes_it_warn(
    tmp_path: Path, make_step: Callable[..., StepMetrics], title: str | None, rows: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of older matplotlibs; users see none
        plot_loss([make_step(i + 1, 2.0) for i in range(rows)], tmp_path / "loss.png", title)
    assert has_colour(tmp_path / "loss.png", TRAIN) == (rows > 0)


def test_a_loss_that_is_not_finite_is_marked(tmp_path: Path, make_step: Callable[..., StepMetrics]) -> None:
    rows = [make_step(1, 2.0), make_step(2, 1.5), make_step(3, float("nan")), make_step(4, float("inf"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of older matplotlibs; users see none
        plot_loss(rows, tmp_path / "loss.png")
    assert has_colour(tmp_path / "loss.png", "#dc2626")


def test_pyplot_is_not_imported() -> None:
    code = "import sys, pyralis.train.report.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
