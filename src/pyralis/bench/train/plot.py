"""The picture of `pyralis bench train`: milliseconds and memory of a step, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyralis.bench.train.peers import PYRALIS
from pyralis.bench.train.results import Record, Run
from pyralis.bench.train.settings import Shape
from pyralis.bench.train.tables import GIB, ordered

OURS, THEIRS = "#c2410c", "#94a3b8"


def plot_steps(path: Path, record: Record) -> None:
    """A row of two panels for each shape: time on the left, peak memory on the right; written beside and renamed."""
    from matplotlib.figure import Figure

    runs = [run for run in ordered(record.runs) if run.measured is not None]
    shapes: list[Shape] = list(dict.fromkeys(run.case.shape for run in runs))
    counts = [sum(run.case.shape == shape for run in runs) for shape in shapes]
    panels = 1 if record.rates is None else 2  # a CPU's memory is not measured
    figure = Figure(figsize=(9, 1.0 + 0.9 * len(shapes) + 0.24 * len(runs)), layout="constrained")
    grid = figure.subplots(len(shapes), panels, squeeze=False, gridspec_kw={"height_ratios": [n + 2 for n in counts]})
    for shape, line in zip(shapes, grid):
        here = [run for run in runs if run.case.shape == shape]
        _bars(line[0], here, [run.seconds * 1e3 for run in here], "%.0f", f"{shape} tokens: ms a step")
        line[0].set_yticks(range(len(here)), _names(here))
        for axes in line[1:]:
            peaks = [run.measured.peak_allocated / GIB for run in here if run.measured is not None]
            _bars(axes, here, peaks, "%.1f", "peak GiB allocated")
            axes.set_yticks([])
    bench = record.bench
    gpu = "no GPU" if record.rates is None else record.rates.gpu
    figure.suptitle(f"{bench.model}, {bench.mode}: {gpu}", fontsize=10)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(path)


def _bars(axes: Any, runs: Sequence[Run], values: Sequence[float], form: str, title: str) -> None:
    colors = [OURS if run.case.peer == PYRALIS else THEIRS for run in runs]
    axes.bar_label(axes.barh(range(len(runs)), values, 0.7, color=colors), fmt=form, fontsize=7, padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=8, loc="left")


def _names(runs: Sequence[Run]) -> list[str]:
    several = len({run.case.loop for run in runs}) > 1
    return [f"{run.case.peer} {run.case.variant}" + (f", {run.case.loop}" if several else "") for run in runs]
