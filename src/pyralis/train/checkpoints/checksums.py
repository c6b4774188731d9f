"""Checksums of a checkpoint's files, written before it gets its name: what was damaged since is not resumed from.

XXH3, which finds accidents, not attacks, as fast as files are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import xxhash

from pyralis.models.staging import write_text

CHECKSUMS_NAME = "pyralis_checksums.json"
_BLOCK = 1 << 20  # bytes read at a time


def write_checksums(folder: Path) -> None:
    """`pyralis_checksums.json`: length and XXH3 of every file that lies in the folder, and those on the disk."""
    found = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the contents
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": _digest(path)}
    write_text(folder / CHECKSUMS_NAME, json.dumps(found, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if nothing, or without checksums (another program's).

    A file read once is not read again while its size and time of writing stay.
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return None
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
        wanted = {name: (int(entry["bytes"]), str(entry["xxh3_128"])) for name, entry in expected.items()}
        return _first_damage(folder, wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"{CHECKSUMS_NAME} is damaged"


def _first_damage(folder: Path, wanted: Mapping[str, tuple[int, str]]) -> str | None:
    for name, (size, digest) in wanted.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            return f"{CHECKSUMS_NAME} names {name}, outside the folder"
        if not file.is_file():
            return f"{name} is missing"
        status = file.stat()
        if status.st_size != size:
            return f"{name} has {status.st_size:,} bytes, {size:,} were written"
        if _known_digest(file, status.st_size, status.st_mtime_ns) != digest:
            return f"{name} is not what was written"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_NAME)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _known_digest(path: Path, size: int, mtime_ns: int) -> str:
    return _digest(path)
