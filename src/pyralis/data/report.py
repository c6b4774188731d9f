"""What became of the data: read, kept, dropped and why, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass

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
        split, pieces: overlong rows that were split, and how many of `rows_kept` they became.
        tokens_lost: tokens cut off or left out with their row. Those of bad rows are not known.
        duplicates: of `rows_kept`, those that are the same as an earlier one.
        uncut_percentiles: as length_percentiles, of all rows before they were cut or left out; empty where nothing was
            lost.
        shared: of the evaluation rows, those that are training rows too; 0 in the report on the training data.
        supervised_tokens: tokens that the loss is taken on.
        length_percentiles: (percent, tokens).
        length_histogram: (upper edge, examples) of bins of one round width, from 0 on, at most 20.
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
    split: int = 0
    pieces: int = 0
    tokens_lost: int = 0
    duplicates: int = 0
    shared: int = 0
    uncut_percentiles: tuple[tuple[int, int], ...] = ()
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
        pieces = f" ({_number(self.split, 'long one')} split into {self.pieces:,})" if self.split else ""
        lines.append(
            f"{_number(self.rows_kept, 'row')} kept of {self.rows_read:,}{pieces}: {self.tokens:,} tokens, "
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
        if self.tokens_lost:
            share = self.tokens_lost / (self.tokens + self.tokens_lost)
            whole = dict(self.uncut_percentiles)
            lines.append(
                f"lost by that: {_number(self.tokens_lost, 'token')} ({share:.1%}); of all rows 50 % are up to "
                f"{whole[50]:,} tokens long, 95 % up to {whole[95]:,}, 99 % up to {whole[99]:,}"
            )
        lines.extend(f"note: {warning}" for warning in self.warnings)
        if self.eval is not None:
            lines.extend(f"eval: {line}" for line in self.eval.summary_lines())
        return lines


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
