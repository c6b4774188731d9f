"""What is counted while rows go by."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pyralis.data.encoded_row import EncodedRow
from pyralis.data.repeats import Seen
from pyralis.data.report import EXAMPLES_PER_REASON, PERCENTILES, DataReport, Dropped, FileReport
from pyralis.data.types import Source


@dataclass
class Tally:
    """Counts kept while rows go by; `report` closes them."""

    formats: dict[str, str] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    dropped_rows: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    kept_tokens: int = 0
    truncated: int = 0
    split: int = 0
    pieces: int = 0
    tokens_lost: int = 0
    in_pieces: bool = False
    seen: Seen = field(default_factory=Seen)
    full_lengths: array[int] = field(default_factory=lambda: array("I"))

    def read(self, source: Source, fmt: str | None) -> None:
        if fmt is not None:
            self.formats.setdefault(source.file, fmt)
        self.rows[source.file] += 1

    def add(self, row: EncodedRow) -> None:
        """Count what became of a row, or of a piece of one."""
        self.tokens_lost += row.full_length - row.length
        if row.full_length:
            self.full_lengths.append(row.full_length)
        if row.continues:
            begins = not self.in_pieces
            self.split, self.pieces = self.split + begins, self.pieces + 1 + begins
        self.in_pieces = row.continues
        if row.dropped is not None:
            self.dropped_rows[row.dropped] += 1
            examples = self.dropped.setdefault(row.dropped, [])
            if len(examples) < EXAMPLES_PER_REASON:
                examples.append(f"{row.source} ({row.detail})" if row.detail and not examples else str(row.source))
            return
        self.kept += 1
        self.kept_tokens += row.length
        self.truncated += row.full_length > row.length
        self.seen.add(row)

    @property
    def drops(self) -> tuple[Dropped, ...]:
        """By number, the most frequent reason first."""
        return tuple(
            Dropped(reason, rows, tuple(self.dropped[reason])) for reason, rows in self.dropped_rows.most_common()
        )

    @property
    def lost(self) -> tuple[float, float]:
        """(share of the rows that are left out, share of the tokens that are cut off or left out)"""
        rows = self.dropped_rows.total()
        return rows / max(1, rows + self.kept), self.tokens_lost / max(1, self.tokens_lost + self.kept_tokens)

    def report(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        sequences: int,
        tokens: int,
        supervised_tokens: int,
        packed_fill: float | None,
        warnings: Sequence[str] = (),
        duplicates: int = 0,
        shared: int = 0,
        eval_report: DataReport | None = None,
    ) -> DataReport:
        lengths = np.asarray(lengths)
        width = _bin_width(int(lengths.max()))
        counts = np.bincount(lengths // width)
        return DataReport(
            files=tuple(FileReport(file, self.formats.get(file, "unknown"), rows) for file, rows in self.rows.items()),
            rows_read=self.rows.total(),
            rows_kept=len(lengths),
            sequences=sequences,
            dropped=self.drops,
            truncated=self.truncated,
            tokens=tokens,
            supervised_tokens=supervised_tokens,
            longest=int(lengths.max()),
            length_percentiles=_percentiles(lengths),
            length_histogram=tuple((width * (i + 1), int(count)) for i, count in enumerate(counts)),
            packed_fill=packed_fill,
            warnings=(*(f"{count:,} {what}" for what, count in self.counts.items() if count), *warnings),
            split=self.split,
            pieces=self.pieces,
            tokens_lost=self.tokens_lost,
            duplicates=duplicates,
            shared=shared,
            uncut_percentiles=_percentiles(np.array(self.full_lengths)) if self.tokens_lost else (),
            eval=eval_report,
        )


def _percentiles(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((p, int(np.percentile(lengths, p))) for p in PERCENTILES)


def _bin_width(longest: int) -> int:
    """The smallest round number of tokens (1, 2 or 5 times a power of ten) of which 20 bins hold `longest`."""
    power = 1
    while True:
        for width in (power, 2 * power, 5 * power):
            if longest < 20 * width:
                return width
        power *= 10
