"""Files and folders that appear whole: written beside their place and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyralis.errors import ModelError


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader or a killed run never sees half a file."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that takes the place of `out` when the block ends well, and is removed when it does not.

    Raises:
        ModelError: `out` holds something, and `overwrite` is false or what it holds is not a model; or no folder can be
            made there.
    """
    check_target(out, overwrite=overwrite)
    staging = out.parent / f".{out.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise ModelError(f"{out} cannot be made: {error.strerror}. Choose another folder.") from error
    try:
        yield staging
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise ModelError unless a model may be written to `out`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ModelError(f"{out} is a file; expected a folder to write to.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ModelError(f"{out} is not empty: choose another folder, or --overwrite to replace it.")
    if not (out / "config.json").is_file():
        raise ModelError(f"{out} is not empty and holds no model: it is not overwritten. Choose another folder.")


def check_not_base(out: Path, base: str | Path | None) -> None:
    """Raise ModelError if `out` is the folder of the base model, which adapters name: their base would be gone."""
    if base is not None and out.exists() and Path(base).expanduser().exists() and out.samefile(Path(base).expanduser()):
        raise ModelError(f"{out} is the base model itself, on which its adapters stand: choose another folder.")


def check_disk_space(parent: Path, needed: int) -> None:
    """Raise ModelError unless the disk that `parent` is (or will be) on has `needed` bytes free."""
    existing = next(folder for folder in (parent, *parent.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ModelError(f"{parent} has {_size(free)} free, but {_size(needed)} are needed: make room there.")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
