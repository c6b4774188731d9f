"""How the hub is asked for files that are not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class HubOptions:
    """token: for private and gated repositories; None takes the one that `hf auth login` stored. cache_dir: the hub's
    cache; None is its own. local_files_only: take what is in the cache and ask nobody."""

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """As transformers takes them; what says nothing is left out."""
        given = {"token": self.token, "cache_dir": self.cache_dir, "local_files_only": self.local_files_only or None}
        return {name: value for name, value in given.items() if value is not None}
