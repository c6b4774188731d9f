"""One run at a time in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pyralis.errors import ConfigError

LOCK_NAME = ".running"


@contextmanager
def only_run_in(output_dir: Path) -> Iterator[None]:
    """Hold the folder (made if need be) while the block runs. The system lets go of it when the process dies.

    Raises:
        ConfigError: another process holds it, or it cannot be written to.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {output_dir} cannot be made: {error.strerror}.") from None
    path = output_dir / LOCK_NAME
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"output_dir {output_dir}: another run is writing into it. Wait for it, or choose another output_dir."
        ) from None
    except PermissionError:
        raise ConfigError(f"output_dir {output_dir} cannot be written to.") from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
