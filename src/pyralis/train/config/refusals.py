"""What transformers and torch refuse about a config, said as a user's error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyralis.errors import ConfigError, PyralisError


@contextmanager
def refusals_named(what: str = "transformers refuses this config") -> Iterator[None]:
    """Turn the block's wrong values, missing libraries and files into a ConfigError: `what`, and the reason's
    first line."""
    try:
        yield
    except PyralisError:
        raise
    except (ValueError, ImportError, NotImplementedError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{what}: {reason}") from error
