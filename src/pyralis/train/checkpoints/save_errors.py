"""When a checkpoint cannot be written: its half is removed, and the error says what is safe and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pyralis.errors import SaveError
from pyralis.train.checkpoints.checkpoint import list_checkpoints

_WRITERS = ("PytorchStreamWriter", "iostream error", "inline_container")  # torch.save's words for a failed write


@contextmanager
def save_errors_named(what: str, staging: Path, run_dir: Path) -> Iterator[None]:
    """Raise SaveError for what the writers raise, after removing `staging`; other errors pass."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _WRITERS):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        whole = list_checkpoints(run_dir)
        last = (
            f"{whole[-1][1].name} is whole: the same command goes on from it" if whole else "no checkpoint lies there"
        )
        raise SaveError(f"{what}: {_cause(error)}. {_room(run_dir)}Make room, then start again; {last}.") from error


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0] or type(error).__name__


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:,.1f} GiB are free there. "
    except OSError:
        return ""
