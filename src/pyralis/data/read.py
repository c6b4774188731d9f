"""Files, folders, globs and hub datasets -> rows as they were written, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from pyralis.data.files import HubDataset, kind_of, resolve_files
from pyralis.data.formats import LIST_KEYS, ROW_KEYS
from pyralis.data.types import Source
from pyralis.errors import DataError

Row: TypeAlias = dict[str, Any]
_BOM = b"\xef\xbb\xbf"
_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}


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


def read_file(path: Path) -> Iterator[tuple[Row, Source]]:
    """Rows of one file; its kind is told by its suffix."""
    readers = {
        "jsonl": _read_jsonl,
        "json": _read_json,
        "csv": _read_csv,
        "tsv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
        "text": _read_text,
    }
    kind = kind_of(path)
    assert kind is not None, f"{path} was not resolved by resolve_files"
    try:
        yield from readers[kind](path)
    except (pa.ArrowException, gzip.BadGzipFile, EOFError, zlib.error) as error:
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


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _decode(raw: bytes, where: str, offset: int) -> str:
    """UTF-8 -> text; `offset` is where `raw` begins in its file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        looks = " It looks like UTF-16." if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(f"{where}: not UTF-8 ({wrong}).{looks} Save the file as UTF-8.") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}.") from error


def _must_be_object(value: Any, source: Source) -> Row:
    if not isinstance(value, dict):
        found = _JSON_NAMES.get(type(value), "null")
        raise DataError(f"{source}: a row must be a JSON object {{...}}, found {found}.")
    return value


def _read_jsonl(path: Path) -> Iterator[tuple[Row, Source]]:
    offset = 0
    with _open(path) as lines:
        for number, raw in enumerate(lines, 1):
            start, offset = offset, offset + len(raw)
            if number == 1 and raw.startswith(_BOM):
                raw, start = raw[len(_BOM) :], len(_BOM)
            source = Source(str(path), number)
            line = _decode(raw, str(source), start)
            if line.strip():
                yield _must_be_object(_parse_json(line, str(source)), source), source


def _read_json(path: Path) -> Iterator[tuple[Row, Source]]:
    """An array of objects, an object with one list of them, a single row, or JSONL that is named .json."""
    with _open(path) as file:
        raw = file.read()
    start = len(_BOM) if raw.startswith(_BOM) else 0
    text = _decode(raw[start:], str(path), start)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path)
            return
        where = f"{path}:{error.lineno}"
        raise DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}.") from error
    for number, row in enumerate(_rows_of(value, path), 1):
        source = Source(str(path), number)
        yield _must_be_object(row, source), source


def _rows_of(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if ROW_KEYS & value.keys():
            return [value]
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) == 1:
            return value[lists[0]]
        raise DataError(f"{path}: a JSON object must hold its rows as its one list; this has {len(lists)} lists.")
    found = _JSON_NAMES.get(type(value), "null")
    raise DataError(f"{path}: expected an array of objects, or an object that holds one, found {found}.")


def _read_csv(path: Path) -> Iterator[tuple[Row, Source]]:
    with _open(path) as file:
        raw = file.read()
    start = len(_BOM) if raw.startswith(_BOM) else 0
    text = _decode(raw[start:], str(path), start)
    header, *records = _csv_records(text, "\t" if kind_of(path) == "tsv" else ",", path) or [(1, [])]
    columns = header[1]
    if len(set(columns)) != len(columns) or not all(columns):
        raise DataError(f"{path}:1: the header must name each column, once each; it is {columns}.")
    for line, cells in records:
        source = Source(str(path), line)
        if len(cells) != len(columns):
            raise DataError(
                f"{source}: {len(cells)} cells, but the header names {len(columns)} columns. "
                "A cell with a separator, a quote or a line break must stand in double quotes."
            )
        yield {key: _parse_cell(key, cell, source) for key, cell in zip(columns, cells)}, source


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


def _parse_cell(key: str, cell: str, source: Source) -> Any:
    """A list of messages can stand in a cell only as JSON."""
    if key in LIST_KEYS and cell.lstrip().startswith("["):
        return _parse_json(cell, f"{source}, column {key!r}")
    return cell


def _read_parquet(path: Path) -> Iterator[tuple[Row, Source]]:
    with pq.ParquetFile(path) as file:
        yield from _read_batches(file.iter_batches(batch_size=1000), path)


def _read_arrow(path: Path) -> Iterator[tuple[Row, Source]]:
    with pa.memory_map(str(path)) as file:
        yield from _read_batches(pa.ipc.open_stream(file), path)


def _read_batches(batches: Iterable[pa.RecordBatch], path: Path) -> Iterator[tuple[Row, Source]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield row, Source(str(path), number)


def _read_text(path: Path) -> Iterator[tuple[Row, Source]]:
    """A .txt file is one document."""
    with _open(path) as file:
        raw = file.read()
    start = len(_BOM) if raw.startswith(_BOM) else 0
    text = _decode(raw[start:], str(path), start)
    if text.strip():
        yield {"text": text}, Source(str(path), 1)
