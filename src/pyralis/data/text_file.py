"""Data files opened through their compression, and bytes as text."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO

import pyarrow as pa

from pyralis.errors import DataError

BOM = b"\xef\xbb\xbf"


def open_file(path: Path) -> IO[bytes]:
    """The file's bytes, looking through .gz and .zst."""
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def read_text(path: Path) -> str:
    """A whole file as text, without the byte order mark that it may begin with."""
    with open_file(path) as file:
        raw = file.read()
    start = len(BOM) if raw.startswith(BOM) else 0
    return decode(raw[start:], str(path), start)


def decode(raw: bytes, where: str, offset: int) -> str:
    """UTF-8 -> text; `offset` is where `raw` begins in its file.

    Raises:
        DataError: naming `where` and the first byte that is not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        looks = " It looks like UTF-16." if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(f"{where}: not UTF-8 ({wrong}).{looks} Save the file as UTF-8.") from error
