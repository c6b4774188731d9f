"""The page of `pyralis compare`: curves overlaid, figures, and what the configs differ in; one file, offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyralis.models.staging import write_text
from pyralis.train.report.compare import FIGURES, Run, differences, status_words
from pyralis.train.report.compare_chart import evaluation_chart, training_chart
from pyralis.train.report.page import render_page

COLOURS = 8
"""So many colours there are; further runs get them again with dashed lines."""


def write_comparison(path: str | Path, runs: Sequence[Run]) -> None:
    """Write the page beside `path` and rename it. Everything that came from outside is escaped."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_comparison(runs))


def render_comparison(runs: Sequence[Run]) -> str:
    return render_page(
        "compare",
        runs=runs,
        status=[status_words(run) for run in runs],
        figures=[(figure, figure.best(runs)) for figure in FIGURES if figure.english != "status"],
        differences=differences(runs),
        colours=COLOURS,
        training=training_chart(runs),
        evaluation=evaluation_chart(runs),
    )
