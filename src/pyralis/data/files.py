"""Which files the words of a config mean: paths, folders, globs, hub datasets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from pyralis.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# What `datasets.save_to_disk` writes beside its Arrow files: about rows, not rows.
_NOT_ROWS = {"dataset_info.json", "dataset_dict.json", "state.json"}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A dataset of the Hugging Face hub, written `owner/name` or `name:config` in a config."""

    name: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.config}" if self.config else self.name


def kind_of(path: Path) -> str | None:
    """What a file's name says it holds (a value of KINDS), looking through .gz and .zst; None if it says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def resolve_files(files: str | Path | Sequence[str | Path], *, split: str = "train") -> list[Path | HubDataset]:
    """Every file that `files` names, in order: a file, a folder (recursively, sorted), a glob (sorted), a hub dataset,
    or a list of them. `split` picks the subfolder of a saved `DatasetDict`.

    Raises:
        DataError: nothing is there, a folder holds no data file, or a file is of a kind that is not read.
    """
    entries = [files] if isinstance(files, str | Path) else list(files)
    resolved = [found for entry in entries for found in _resolve_one(str(entry), split)]
    if not resolved:
        raise DataError("No data file is given: `train_file` is empty. Name a file, a folder, a glob or a hub dataset.")
    return list(dict.fromkeys(resolved))


def _resolve_one(entry: str, split: str) -> Iterator[Path | HubDataset]:
    path = Path(entry).expanduser()
    if path.is_dir():
        yield from _files_in(path, split)
    elif path.exists():
        if kind_of(path) is None:
            these = f"files named *{path.suffix}" if path.suffix else "files without a suffix"
            raise DataError(f"{entry}: {these} are not read. Known are {_known_suffixes()}.")
        yield path
    elif has_magic(entry):
        matches = sorted(match for match in map(Path, glob(str(path), recursive=True)) if match.is_file())
        matches = [match for match in matches if kind_of(match) is not None]
        if not matches:
            raise DataError(f"{entry}: no data file matches this pattern (looked in {Path.cwd()}).")
        yield from matches
    elif (hub := _as_hub_name(entry)) is not None:
        yield hub
    else:
        raise DataError(_missing(entry, path))


def _files_in(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        chosen = folder / split
        if not chosen.is_dir():
            splits = sorted(child.name for child in folder.iterdir() if child.is_dir())
            raise DataError(f"{folder}: a saved dataset without a split {split!r}; it has {', '.join(splits)}.")
        folder = chosen
    inside = [path for path in folder.rglob("*") if path.is_file() and path.name not in _NOT_ROWS]
    visible = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = sorted(path for path in visible if kind_of(path) is not None)
    if not found:
        raise DataError(f"{folder}: no data file in this folder or below it. Known are {_known_suffixes()}.")
    return found


def _as_hub_name(entry: str) -> HubDataset | None:
    """`owner/name`, `owner/name:config` or `name:config`, unless it reads like a path to a local file."""
    match = _HUB_NAME.fullmatch(entry)
    if match is None or not ({"/", ":"} & set(entry)) or entry.startswith(("./", "../")):
        return None
    name = match["name"]
    if kind_of(Path(name)) is not None or ("/" in name and Path(name).parent.exists()):
        return None
    return HubDataset(name, match["config"])


def _missing(entry: str, path: Path) -> str:
    absolute = path.absolute()
    message = f"{entry}: there is no such file or folder (looked for {absolute})."
    parent = absolute.parent
    if not parent.is_dir():
        existing = next(folder for folder in parent.parents if folder.is_dir())
        return f"{message} The folder {parent} does not exist either; {existing} does."
    names = sorted(child.name for child in parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"{message} Did you mean {' or '.join(near)}?"
    return f"{message} A hub dataset is named owner/name or name:config."


def _known_suffixes() -> str:
    return ", ".join(KINDS) + f" (also with {' or '.join(COMPRESSIONS)} behind)"
