"""The numbers about the data as a person reads them on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from pyralis.data.report import DataReport
from pyralis.data.stats import BatchStats

_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, slots=True)
class LengthHistogram:
    """Bars of (upper edge, rows), as wide as the terminal allows; at most 60 characters."""

    bins: tuple[tuple[int, int], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        first, last = _filled(self.bins)
        edges = [0, *(upper for upper, _ in self.bins)]
        names = [f"{edges[i]:,} to {edges[i + 1] - 1:,}" for i in range(first, last)]
        counts = [f"{count:,}" for _, count in self.bins[first:last]]
        side, number = max(map(len, names)), max(map(len, counts))
        room = max(min(options.max_width - side - number - 4, 60), 1)
        most = max(count for _, count in self.bins)
        for name, shown, (_, count) in zip(names, counts, self.bins[first:last]):
            bar = Text(_bar(count / most, room), "green")
            yield Text.assemble((name.rjust(side), "dim"), "  ", shown.rjust(number), "  ", bar)


def _filled(bins: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Without the empty bins at both ends."""
    filled = [i for i, (_, count) in enumerate(bins) if count]
    return (filled[0], filled[-1] + 1) if filled else (0, len(bins))


def _bar(share: float, room: int) -> str:
    """A bar of eighths of characters; a thin one for anything above nothing."""
    eighths = max(round(share * room * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def stats_table(report: DataReport, batches: BatchStats | None, max_seq_length: int) -> RenderableType:
    """What became of the data, how long its rows are, and what batches they make."""
    parts: list[RenderableType] = [Text(line) for line in report.summary_lines()]
    parts += [Text(), Text("rows by length in tokens", "bold"), LengthHistogram(report.length_histogram)]
    whole = not report.truncated and report.longest <= max_seq_length
    at_limit = f", all within max_seq_length {max_seq_length:,}" if whole else ""
    parts.append(Text(f"longest {report.longest:,}{at_limit}", "dim"))
    if batches is not None:
        parts += [Text(), Text("batches", "bold"), *map(Text, batches.lines())]
    return Group(*parts)
