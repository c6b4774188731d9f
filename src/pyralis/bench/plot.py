"""The picture of `pyralis bench ops`: shares of the roofline, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyralis.bench.case import PYRALIS
from pyralis.bench.measure import Rates

if TYPE_CHECKING:
    from pyralis.bench.ops import Result


def plot_shares(path: Path, results: Sequence[Result], rates: Rates) -> None:
    """A group of bars per case, one bar per contender; 100 % is the copy or matmul rate of the same run."""
    from matplotlib.figure import Figure

    names = [PYRALIS, *dict.fromkeys(name for r in results for name in r.timings if name != PYRALIS)]
    height = 0.8 / len(names)
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(names) * len(results)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        rows = [row for row, result in enumerate(results) if name in result.timings]
        shares = [100 * results[row].share(name) for row in rows]
        bars = axes.barh([row + i * height for row in rows], shares, height, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=6, padding=2)
    middle = 0.4 - height / 2
    axes.set_yticks([row + middle for row in range(len(results))])
    axes.set_yticklabels([f"{r.op}\n{r.shape}, {r.tokens} tokens" for r in results], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of the roofline")
    axes.set_title(str(rates), fontsize=9)
    axes.legend(fontsize=7)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(path)
