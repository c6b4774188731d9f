"""What a check finds out about a config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyralis.train.config.train_config import TrainConfig


@dataclass(frozen=True)
class Finding:
    """Something about the fields `keys`: a problem that keeps the config from being trained, or a note."""

    keys: tuple[str, ...]
    message: str
    fatal: bool = True


def note(*keys: str, message: str) -> Finding:
    """A finding that does not keep the config from being trained."""
    return Finding(keys, message, fatal=False)


def unused(config: TrainConfig, names: tuple[str, ...], why: str) -> Iterator[Finding]:
    """A note on those of the fields that were changed from their default, and have no effect."""
    changed = [name for name in names if getattr(config, name) != type(config).model_fields[name].default]
    if changed:
        verb = "has" if len(changed) == 1 else "have"
        yield note(*changed, message=f"{', '.join(changed)}: {verb} no effect: {why}.")
