"""What became of the data: read, kept, dropped and why, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pyralis.data.types import Source

PERCENTILES = (5, 25, 50, 75, 95, 99)
EXAMPLES_PER_REASON = 5


@dataclass(frozen=True, slots=True)
class FileReport:
    file: str
    format: str
    rows: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Rows left out for one reason, and the first few of them (file:line)."""

    reason: str
    rows: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        more = " ..." if self.rows > len(self.examples) else ""
        return f"dropped {_number(self.rows, 'row')}, {self.reason}: {', '.join(self.examples)}{more}"


@dataclass(frozen=True, slots=True)
class DataReport:
    """Numbers about the training data. Lengths are those of examples or documents before packing, in tokens.

    Attributes:
        rows_kept: examples or documents to train on; `sequences` is the number of rows they stand in.
        packed_fill: share of the packed rows' room that holds tokens; None without packing.
        truncated: rows cut to max_seq_length, of `rows_kept`.
        supervised_tokens: tokens that the loss is taken on.
        length_percentiles: (percent, tokens).
        length_histogram: (upper edge, examples), 20 bins of one width.
        eval: the same about the evaluation data.
    """

    files: tuple[FileReport, ...]
    rows_read: int
    rows_kept: int
    sequences: int
    dropped: tuple[Dropped, ...]
    truncated: int
    tokens: int
    supervised_tokens: int
    longest: int
    length_percentiles: tuple[tuple[int, int], ...]
    length_histogram: tuple[tuple[int, int], ...]
    packed_fill: float | None
    warnings: tuple[str, ...]
    eval: DataReport | None = None

    @property
    def rows_dropped(self) -> int:
        return sum(dropped.rows for dropped in self.dropped)

    def summary_lines(self) -> list[str]:
        """The report in a few plain lines, for a terminal or a log."""
        lines = [f"{file.file}: {_number(file.rows, 'row')} as {file.format}" for file in self.files[:8]]
        if len(self.files) > 8:
            rest = self.files[8:]
            lines.append(f"and {len(rest)} more files with {_number(sum(file.rows for file in rest), 'row')}")
        share = self.supervised_tokens / max(1, self.tokens)
        lines.append(
            f"{_number(self.rows_kept, 'row')} kept of {self.rows_read:,}: {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} of them learnt ({share:.0%})"
        )
        percentiles = dict(self.length_percentiles)
        lines.append(
            f"length in tokens: median {percentiles[50]:,}, 95 % below {percentiles[95]:,}, longest {self.longest:,}"
        )
        if self.packed_fill is not None:
            lines.append(f"packed into {_number(self.sequences, 'row')}, {self.packed_fill:.1%} full")
        lines.extend(map(str, self.dropped))
        if self.truncated:
            lines.append(f"truncated {_number(self.truncated, 'row')} to max_seq_length")
        lines.extend(f"note: {warning}" for warning in self.warnings)
        if self.eval is not None:
            lines.extend(f"eval: {line}" for line in self.eval.summary_lines())
        return lines


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@dataclass
class Tally:
    """Counts kept while rows go by; `report` closes them."""

    formats: dict[str, str] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    dropped_rows: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def read(self, source: Source, fmt: str) -> None:
        self.formats.setdefault(source.file, fmt)
        self.rows[source.file] += 1

    def drop(self, source: Source, reason: str) -> None:
        self.dropped_rows[reason] += 1
        examples = self.dropped.setdefault(reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(str(source))

    @property
    def drops(self) -> tuple[Dropped, ...]:
        """By number, the most frequent reason first."""
        return tuple(
            Dropped(reason, rows, tuple(self.dropped[reason])) for reason, rows in self.dropped_rows.most_common()
        )

    def report(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        sequences: int,
        tokens: int,
        supervised_tokens: int,
        packed_fill: float | None,
        warnings: Sequence[str] = (),
        eval_report: DataReport | None = None,
    ) -> DataReport:
        lengths = np.asarray(lengths)
        counts, edges = np.histogram(lengths, bins=20, range=(0, max(20, int(lengths.max()))))
        return DataReport(
            files=tuple(FileReport(file, self.formats[file], rows) for file, rows in self.rows.items()),
            rows_read=self.rows.total(),
            rows_kept=len(lengths),
            sequences=sequences,
            dropped=self.drops,
            truncated=self.truncated,
            tokens=tokens,
            supervised_tokens=supervised_tokens,
            longest=int(lengths.max()),
            length_percentiles=tuple((p, int(np.percentile(lengths, p))) for p in PERCENTILES),
            length_histogram=tuple((int(np.ceil(edge)), int(count)) for edge, count in zip(edges[1:], counts)),
            packed_fill=packed_fill,
            warnings=(*(f"{count:,} {what}" for what, count in self.counts.items() if count), *warnings),
            eval=eval_report,
        )
