"""Sources of data -> rows with their format, in order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pyralis.data.encoded_row import RawRow
from pyralis.data.formats import detect_format
from pyralis.data.settings import DataSettings
from pyralis.data.tally import Tally
from pyralis.data.types import OnBad, Row, Source
from pyralis.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DataSource:
    """A file or a loaded hub dataset: its name, a digest of its content, its rows (see `read_file`), and about how many
    they are, where that can be told."""

    name: str
    digest: str
    rows: Callable[[OnBad | None], Iterator[tuple[Row, Source]]]
    about_rows: int | None = None


def raw_rows(sources: Sequence[DataSource], settings: DataSettings, tally: Tally) -> Iterator[RawRow]:
    """Rows with their format: the named one, or that of the first row of each file. Rows that cannot be read come with
    their error, where such are skipped."""
    skip = settings.on_bad_row == "skip"
    for data_source in sources:
        fmt = None if settings.data_format == "auto" else settings.data_format
        unread: deque[RawRow] = deque()

        def keep(source: Source, error: DataError, unread: deque[RawRow] = unread) -> None:
            unread.append(RawRow({}, "", source, error))

        for row, source in data_source.rows(keep if skip else None):
            yield from _counted(unread, tally)
            error = None
            if fmt is None:
                try:
                    fmt = detect_format(row, source)
                except DataError as unknown:
                    if not skip:
                        raise
                    error = unknown
            if fmt is not None and source.file not in tally.formats:
                logger.info("%s: rows are read as %s", source.file, fmt)
            tally.read(source, fmt)
            yield RawRow(row, fmt or "", source, error)
        yield from _counted(unread, tally)


def _counted(unread: deque[RawRow], tally: Tally) -> Iterator[RawRow]:
    while unread:
        tally.read(unread[0].source, None)
        yield unread.popleft()
