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
        ModelError: `out` holds something, and `overwrite` is false or what it holds is not a model.
    """
    check_target(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    staging.mkdir()
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


def check_disk_space(parent: Path, needed: int) -> None:
    """Raise ModelError unless the disk that `parent` is (or will be) on has `needed` bytes free."""
    existing = next(folder for folder in (parent, *parent.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ModelError(
            f"{parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed: make room there."
        )
