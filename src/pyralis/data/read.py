"""Files, folders, globs and hub datasets -> rows as they were written, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pyralis.data.files import HubDataset, kind_of, resolve_files
from pyralis.data.formats import LIST_KEYS
from pyralis.data.json_rows import parse_json, read_json, read_jsonl
from pyralis.data.text_file import read_text
from pyralis.data.types import OnBad, Row, Source
from pyralis.errors import DataError


def read_rows(
    files: str | Path | Sequence[str | Path], *, split: str = "train", cache_dir: Path | None = None
) -> Iterator[tuple[Row, Source]]:
    """Rows of everything that `files` names (see `resolve_files`), in order.

    JSONL, JSON (an array, or an object with one list), CSV, TSV, Parquet, Arrow and plain text, also behind .gz or
    .zst. `split` and `cache_dir` are for hub datasets. Blank lines are skipped.

    Raises:
        DataError: naming file, line and reason, at the first row that cannot be read.
    """
    for source in resolve_files(files, split=split):
        if isinstance(source, HubDataset):
            yield from read_hub(load_hub(source, split=split, cache_dir=cache_dir), source)
        else:
            yield from read_file(source)


def read_file(path: Path, on_bad: OnBad | None = None) -> Iterator[tuple[Row, Source]]:
    """Rows of one file; its kind is told by its suffix. A row that cannot be read goes to `on_bad`, or is an error.

    Raises:
        DataError: a file that cannot be read as a whole; a bad row, without `on_bad`.
    """
    readers: dict[str, Callable[[Path, OnBad | None], Iterator[tuple[Row, Source]]]] = {
        "jsonl": read_jsonl,
        "json": read_json,
        "csv": _read_csv,
        "tsv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
        "text": _read_text,
    }
    kind = kind_of(path)
    assert kind is not None, f"{path} was not resolved by resolve_files"
    try:
        yield from readers[kind](path, on_bad)
    except (pa.ArrowException, gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable {kind} file ({error}). Is it damaged or only half copied?") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def load_hub(dataset: HubDataset, *, split: str, cache_dir: Path | None) -> Any:
    """The split of a hub dataset, downloaded by `datasets` (which runs no code of the repository)."""
    import datasets

    try:
        return datasets.load_dataset(
            dataset.name, dataset.config, split=split, cache_dir=None if cache_dir is None else str(cache_dir)
        )
    except (OSError, ValueError, RuntimeError) as error:
        # datasets' own errors (not found, unknown split or config, no network) derive from these three.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{dataset}: no such file or folder here, and as a hub dataset its split {split!r} cannot be loaded: "
            f"{first_line} Without network, download it elsewhere and name the local file."
        ) from error


def read_hub(rows: Iterable[Row], dataset: HubDataset) -> Iterator[tuple[Row, Source]]:
    """Rows of a loaded hub dataset, numbered from 1."""
    for number, row in enumerate(rows, 1):
        yield row, Source(str(dataset), number)


def _read_csv(path: Path, on_bad: OnBad | None) -> Iterator[tuple[Row, Source]]:
    text = read_text(path)
    header, *records = _csv_records(text, "\t" if kind_of(path) == "tsv" else ",", path) or [(1, [])]
    columns = header[1]
    if len(set(columns)) != len(columns) or not all(columns):
        raise DataError(f"{path}:1: the header must name each column, once each; it is {columns}.")
    for line, cells in records:
        source = Source(str(path), line)
        try:
            row = _parse_cells(columns, cells, source)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(source, error)
            continue
        yield row, source


def _csv_records(text: str, delimiter: str, path: Path) -> list[tuple[int, list[str]]]:
    """Non-blank records, each with the line on which it begins. Cells may be longer than csv's limit of 131072
    characters, which is global: it is lifted only while this file is parsed."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = []
    line = 1
    try:
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    return records


def _parse_cells(columns: Sequence[str], cells: Sequence[str], source: Source) -> Row:
    if len(cells) != len(columns):
        raise DataError(
            f"{source}: {len(cells)} cells, but the header names {len(columns)} columns. "
            "A cell with a separator, a quote or a line break must stand in double quotes."
        )
    return {key: _parse_cell(key, cell, source) for key, cell in zip(columns, cells)}


def _parse_cell(key: str, cell: str, source: Source) -> Any:
    """A list of messages can stand in a cell only as JSON."""
    if key in LIST_KEYS and cell.lstrip().startswith("["):
        return parse_json(cell, f"{source}, column {key!r}")
    return cell


def _read_parquet(path: Path, on_bad: OnBad | None) -> Iterator[tuple[Row, Source]]:
    with pq.ParquetFile(path) as file:
        yield from _read_batches(file.iter_batches(batch_size=1000), path)


def _read_arrow(path: Path, on_bad: OnBad | None) -> Iterator[tuple[Row, Source]]:
    with pa.memory_map(str(path)) as file:
        yield from _read_batches(pa.ipc.open_stream(file), path)


def _read_batches(batches: Iterable[pa.RecordBatch], path: Path) -> Iterator[tuple[Row, Source]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets that a damaged file leads out of its memory would end the process
        for row in batch.to_pylist():
            number += 1
            yield row, Source(str(path), number)


def _read_text(path: Path, on_bad: OnBad | None) -> Iterator[tuple[Row, Source]]:
    """A .txt file is one document."""
    text = read_text(path)
    if text.strip():
        yield {"text": text}, Source(str(path), 1)
