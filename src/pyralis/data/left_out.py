"""The list of the rows that were left out, each with its place and the reason, as JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from pyralis.data.encoded_row import EncodedRow

LEFT_OUT_NAME = "left_out.jsonl"


class LeftOutList:
    """Writes `path` from the first row on that is left out; without any there is no file.

    A line: file, row (1-based: the line of a JSONL or CSV file), reason, detail (of a bad row), tokens (of the row;
    null where they are not known).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> LeftOutList:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: EncodedRow) -> None:
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
        facts = {"file": row.source.file, "row": row.source.row, "reason": row.dropped}
        detail = {"detail": row.detail} if row.detail else {}
        self._file.write(json.dumps(facts | detail | {"tokens": row.full_length or None}, ensure_ascii=False) + "\n")
