"""How the hub is asked for files that are not here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyralis.models.download import hub_is_cut_off


@dataclass(frozen=True, slots=True)
class HubOptions:
    """token: for private and gated repositories; None takes the one that `hf auth login` stored. cache_dir: the hub's
    cache; None is its own. local_files_only: take what is in the cache and ask nobody."""

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def arguments(self, location: str) -> dict[str, Any]:
        """As transformers takes them to load from `location`; what says nothing is left out. Without a connection only
        the cache is asked: otherwise each file would be tried for half a minute, with a line about each try."""
        cached_only = self.local_files_only or (not Path(location).exists() and hub_is_cut_off())
        given = {"token": self.token, "cache_dir": self.cache_dir, "local_files_only": cached_only or None}
        return {name: value for name, value in given.items() if value is not None}
