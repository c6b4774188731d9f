"""Rows of JSONL and JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyralis.data.formats import ROW_KEYS
from pyralis.data.text_file import BOM, decode, open_file, read_text
from pyralis.data.types import OnBad, Row, Source
from pyralis.errors import DataError

_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}


def read_jsonl(path: Path, on_bad: OnBad | None = None) -> Iterator[tuple[Row, Source]]:
    """One object a line; blank lines are skipped."""
    offset = 0
    with open_file(path) as lines:
        for number, raw in enumerate(lines, 1):
            start, offset = offset, offset + len(raw)
            if number == 1 and raw.startswith(BOM):
                raw, start = raw[len(BOM) :], len(BOM)
            source = Source(str(path), number)
            try:
                line = decode(raw, str(source), start).rstrip("\r\n")
                row = _must_be_object(parse_json(line, str(source)), source) if line.strip() else None
            except DataError as error:
                if on_bad is None:
                    raise
                on_bad(source, error)
                continue
            if row is not None:
                yield row, source


def read_json(path: Path, on_bad: OnBad | None = None) -> Iterator[tuple[Row, Source]]:
    """An array of objects, an object with one list of them, a single row, or JSONL that is named .json."""
    text = read_text(path)
    try:
        value = parse_json(text, str(path))
    except DataError as error:
        cause = error.__cause__
        if not isinstance(cause, json.JSONDecodeError):
            raise
        if cause.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from read_jsonl(path, on_bad)
            return
        where = f"{path}:{cause.lineno}"
        raise DataError(f"{where}: not valid JSON at column {cause.colno}: {cause.msg}.") from cause
    for number, row in enumerate(_rows_of(value, path), 1):
        source = Source(str(path), number)
        try:
            found = _must_be_object(row, source)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(source, error)
            continue
        yield found, source


def parse_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        DataError: naming `where`; also for what Python's parser cannot hold (too deep, a number of too many digits).
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}.") from error
    except RecursionError as error:
        raise DataError(f"{where}: the JSON is nested too deeply to be a row of data. Remove the row.") from error
    except ValueError as error:
        raise DataError(f"{where}: the JSON holds a number of too many digits. Write it as text.") from error


def _must_be_object(value: Any, source: Source) -> Row:
    if not isinstance(value, dict):
        found = _JSON_NAMES.get(type(value), "null")
        raise DataError(f"{source}: a row must be a JSON object {{...}}, found {found}.")
    return value


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
