"""How far tokenising has come: an estimate of how many rows there are, and a bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from pyralis.data.files import kind_of

OnProgress: TypeAlias = Callable[[int, int | None], None]
"""Told the rows done so far, and about how many there are, where that can be told."""

_SAMPLE_BYTES = 1 << 20


def about_rows(path: Path) -> int | None:
    """About how many rows a file holds: by the length of its first lines, or as Parquet says; else None."""
    kind = kind_of(path)
    try:
        if kind == "parquet":
            return int(pq.read_metadata(path).num_rows)
        if kind == "jsonl" and path.suffix.lower() in (".jsonl", ".ndjson"):
            with path.open("rb") as file:
                sample = file.read(_SAMPLE_BYTES)
            return round(
                path.stat().st_size / max(len(sample), 1) * (sample.count(b"\n") + (len(sample) < _SAMPLE_BYTES))
            )
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return None  # whoever reads it says what is wrong
    return None


@contextmanager
def tokenising(console: Console, what: str = "reading the data") -> Iterator[OnProgress]:
    """A spinner, and a bar once rows are tokenised; gone when the block ends. Nothing is shown on what is no terminal.

    At 80 columns it fits on one line.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[rows]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, rows="")

        def told(done: int, total: int | None) -> None:
            rows = f"{done:,} rows" if total is None else f"{done:,} of about {max(done, total):,} rows"
            bar.update(task, description="tokenising", completed=done, total=total and max(done, total), rows=rows)

        yield told
