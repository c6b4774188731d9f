"""What `pyralis compare` prints: a column a run, as many side by side as fit, the others below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from pyralis.train.report.compare import FIGURES, Difference, Run, differences
from pyralis.train.report.language import words

RUN_WIDTH, GAP = 17, 2
"""So many cells a run's column has at least; it gets its share of the terminal, and longer texts are folded."""


def comparison_tables(runs: Sequence[Run], width: int) -> Iterator[Table]:
    """width: of the terminal, in cells."""
    found = differences(runs)
    labels = [words(figure.english, figure.chinese) for figure in FIGURES]
    first = max(cell_len(label) for label in [*labels, *(difference.name for difference in found)])
    at_once = min(max((width - first - GAP) // (RUN_WIDTH + GAP), 1), len(runs))
    share = max((width - first - GAP) // at_once - GAP, RUN_WIDTH)
    for start in range(0, len(runs), at_once):
        yield _table(runs, range(start, min(start + at_once, len(runs))), found, share)


def _table(runs: Sequence[Run], shown: range, found: Sequence[Difference], share: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis")
    for index in shown:
        table.add_column(Text(runs[index].name, "bold"), max_width=share, overflow="fold")
    for figure in FIGURES:
        best = figure.best(runs)
        cells = [Text(figure.text(runs[i]), "bold green" if i in best else "") for i in shown]
        table.add_row(words(figure.english, figure.chinese), *cells, end_section=figure is FIGURES[-1])
    for difference in found:
        table.add_row(Text(difference.name), *(Text(difference.values[i]) for i in shown))
    return table
