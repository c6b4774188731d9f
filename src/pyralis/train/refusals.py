"""What transformers and torch refuse about a config, said as a user's error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyralis.errors import ConfigError, PyralisError


@contextmanager
def refusals_named(what: str = "transformers refuses this config") -> Iterator[None]:
    """Turn the block's ValueErrors and missing libraries into a ConfigError: `what`, and the reason."""
    try:
        yield
    except PyralisError:
        raise
    except (ValueError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"{what}: {str(error) or type(error).__name__}") from error
