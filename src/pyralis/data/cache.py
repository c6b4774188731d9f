"""Built datasets, found again by content: what went in decides the folder's name, not where it lay."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from pyralis import __version__
from pyralis.data.settings import DataSettings
from pyralis.data.template import ChatTemplate
from pyralis.errors import DataError
from pyralis.models import fetch

logger = logging.getLogger(__name__)

# Written last: a folder that has it is whole.
REPORT_NAME = "report.json"
# These do not change what comes out. `files` are in the key by name and content.
_NOT_IN_KEY = ("files", "eval_files", "num_workers", "cache_dir")


def cache_root(cache_dir: str | None) -> Path:
    """`datasets` in `cache_dir`, else in $PYRALIS_CACHE, $XDG_CACHE_HOME/pyralis or ~/.cache/pyralis."""
    root = fetch.cache_root() if cache_dir is None else Path(cache_dir).expanduser()
    return root / "datasets"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_key(
    settings: DataSettings,
    contents: list[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
) -> str:
    """A hash of everything that decides the tokens: the data (`contents`: name and digest of each source), the
    settings, the tokenizer, the template, and the code of this package."""
    options = {name: value for name, value in asdict(settings).items() if name not in _NOT_IN_KEY}
    if not settings.eval_split:
        del options["seed"]
    look = None if template is None else (type(template).__name__, template.jinja, template.settings())
    parts = [__version__, _code_digest(), options, contents, _tokenizer_digest(tokenizer), look]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what `save_pretrained` writes; a fast tokenizer is asked directly (30 ms for 49k tokens)."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    digest.update(json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # What stands before is the padding and truncation that the last call left behind.
        serial = backend.to_str()
        digest.update(serial[max(0, serial.find('"added_tokens"')) :].encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(tokenizer.save_pretrained(folder)):
            path = Path(name)
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Have `build` fill a folder, unless `folder` is there: whole or not at all, once for any number of processes.

    Returns:
        Whether it was built now.
    """
    if (folder / REPORT_NAME).is_file():
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot make the dataset cache's folder ({error.strerror}). Set cache_dir to another."
        ) from error
    try:
        with FileLock(folder.parent / f"{folder.name}.lock"):
            return _build_locked(folder, build)
    except PermissionError as error:
        raise DataError(
            f"{folder.parent}: cannot write the dataset cache here. Set cache_dir to another folder."
        ) from error


def _build_locked(folder: Path, build: Callable[[Path], None]) -> bool:
    if (folder / REPORT_NAME).is_file():
        return False
    prefix = f".{folder.name}-"
    # what killed processes left; nobody else builds this while the lock is held
    for left in [folder, *folder.parent.glob(f"{prefix}*")]:
        shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        build(staging)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True
