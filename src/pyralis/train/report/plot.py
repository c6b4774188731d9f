"""The loss picture, `loss.png`: training and evaluation loss above, the learning rate below."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pyralis.train.report.format import loss_text
from pyralis.train.report.metric_rows import EvalMetrics, Metric, StepMetrics
from pyralis.train.report.smoothing import smooth_losses

TRAIN, EVAL, RATE, INK, MUTED, GRID = "#2563eb", "#ea580c", "#64748b", "#0f172a", "#64748b", "#e2e8f0"
# Fonts with Chinese glyphs that Linux, Windows and macOS bring. matplotlib's own DejaVu Sans has none.
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Heiti TC"),
)


def plot_loss(metrics: Sequence[Metric], path: str | Path, title: str | None = None) -> None:
    """Draw the loss of a run as a PNG of 1600 x 1000 pixels, written beside `path` and renamed.

    A title is left out if no installed font has all of its characters. Nothing of matplotlib's global state is touched.
    """
    steps = [m for m in metrics if isinstance(m, StepMetrics)]
    evals = [m for m in metrics if isinstance(m, EvalMetrics)]
    figure = Figure(figsize=(8, 5), dpi=200, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches; the last label stands at the right edge
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    for axes in (loss_axes, rate_axes):
        _style(axes)
    _draw_losses(loss_axes, steps, evals)
    _draw_rate(rate_axes, steps)
    if title and (family := _family_for(title)):
        loss_axes.set_title(title, loc="left", color=INK, fontsize=12, family=family, parse_math=False, pad=12)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, format="png")
    os.replace(beside, path)


def _draw_losses(axes: Axes, steps: Sequence[StepMetrics], evals: Sequence[EvalMetrics]) -> None:
    axes.set_ylabel("loss", color=MUTED)
    x = [m.step for m in steps]
    if len(steps) > 2:
        axes.plot(x, [m.loss for m in steps], color=TRAIN, alpha=0.25, linewidth=1)
        axes.plot(x, smooth_losses(steps), color=TRAIN, linewidth=2, label="train (smoothed)")
    elif steps:
        axes.plot(x, [m.loss for m in steps], color=TRAIN, linewidth=2, marker="o", markersize=5, label="train")
    if evals:
        axes.plot([m.step for m in evals], [m.loss for m in evals], color=EVAL, linewidth=1.5, marker="o", markersize=4)
        axes.lines[-1].set_label("eval")
    _label_last([(m.step, m.loss) for m in steps], axes, TRAIN)
    _label_last([(m.step, m.loss) for m in evals], axes, EVAL)
    broken = next((m.step for m in steps if not math.isfinite(m.loss)), None)
    if broken is not None:
        axes.axvline(broken, color="#dc2626", linewidth=1, linestyle="--", label="loss not finite")
    if steps or evals:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right")
    else:
        axes.text(0.5, 0.5, "nothing was logged", color=MUTED, ha="center", va="center", transform=axes.transAxes)


def _label_last(points: Sequence[tuple[int, float]], axes: Axes, color: str) -> None:
    if finite := [p for p in points if math.isfinite(p[1])]:
        axes.annotate(
            loss_text(finite[-1][1]),
            finite[-1],
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
            annotation_clip=False,
        )


def _draw_rate(axes: Axes, steps: Sequence[StepMetrics]) -> None:
    axes.plot([m.step for m in steps], [m.learning_rate for m in steps], color=RATE, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("lr", color=MUTED)
    axes.set_xlabel("step", color=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value else "0")
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _style(axes: Axes) -> None:
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _family_for(text: str) -> str | None:
    """The first font that has every character of the text: DejaVu Sans, else an installed Chinese one."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    for name in ("DejaVu Sans", *CJK_FONTS):
        if name in installed:
            glyphs = font_manager.get_font(font_manager.findfont(name)).get_charmap()
            if all(ord(character) in glyphs for character in text):
                return name
    return None
