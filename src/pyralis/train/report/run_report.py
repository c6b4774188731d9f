"""The report of a run: one HTML file that opens offline, in a light and a dark form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyralis.data.preview import ShownRow, shortened
from pyralis.data.stats import BatchStats
from pyralis.models.staging import write_text
from pyralis.train.report.environment import Environment
from pyralis.train.report.loss_chart import loss_chart
from pyralis.train.report.memory_table import MemoryTable
from pyralis.train.report.metric_rows import Metric
from pyralis.train.report.page import render_page
from pyralis.train.report.panel import StartupInfo
from pyralis.train.report.part_shares import part_shares
from pyralis.train.report.reproduction import Reproduction
from pyralis.train.report.reward_chart import reward_chart
from pyralis.train.report.run_words import run_in_words
from pyralis.train.report.summary import summarise
from pyralis.train.report.svg import LengthBin, length_chart


@dataclass(frozen=True, slots=True)
class DroppedRows:
    """Rows left out for one reason, some of them as "file:line"."""

    reason: str
    count: int
    examples: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What became of the data (`DataReport`). `lengths` may be empty; `batches` is None where they are not known."""

    files: Sequence[str]
    rows_read: int
    rows_kept: int
    truncated_rows: int = 0
    dropped: Sequence[DroppedRows] = ()
    lengths: Sequence[LengthBin] = ()
    split_rows: int = 0
    pieces: int = 0
    tokens_lost: int = 0
    duplicates: int = 0
    shared: int = 0
    packed_fill: float | None = None
    batches: BatchStats | None = None
    examples: Sequence[ShownRow] = ()


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """One question, answered by the model before and after training. during: (step, answer) at evaluations."""

    question: str
    before: str
    after: str
    during: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class ReportInfo:
    """All that a report shows. What is None or empty is left out of it.

    `notes` and `warnings` stand beside those of `startup`. `config` is the effective config.
    """

    startup: StartupInfo
    metrics: Sequence[Metric]
    config: Mapping[str, Any]
    environment: Environment
    data: DataSummary | None = None
    reproduction: Reproduction | None = None
    memory: MemoryTable | None = None
    samples: Sequence[SampleAnswer] = ()
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    title: str | None = None


def write_report(path: str | Path, info: ReportInfo) -> None:
    """Write the report beside `path` and rename it. Everything that came from outside is escaped."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_report(info))


def render_report(info: ReportInfo) -> str:
    """The page. It asks for nothing from outside, and its policy lets no script run but its own."""
    summary = summarise(info.metrics)
    return render_page(
        "report",
        info=info,
        run=info.startup,
        summary=summary,
        words=run_in_words(info.startup, summary),
        parts=part_shares(summary),
        examples=[shortened(row) for row in (info.data.examples if info.data else ())],
        title=info.title or info.startup.model,
        notes=[*info.startup.notes, *info.notes],
        warnings=[*info.startup.warnings, *info.warnings],
        chart=loss_chart(info.metrics),
        rewards=reward_chart(info.metrics),
        lengths=length_chart(info.data.lengths) if info.data and info.data.lengths else None,
    )
