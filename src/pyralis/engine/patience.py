"""How often a shape comes before its step is recorded: some times to warm up, twice as often after each shortage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

MOST_SHORTAGES = 6  # of memory that still double the wait


class Patience:
    """warm_up: times that a shape is run first."""

    def __init__(self, warm_up: int) -> None:
        self._warm_up = warm_up
        self._seen: Counter[Hashable] = Counter()
        self._shortages = 0

    def waits(self, shape: Hashable) -> bool:
        """A shape comes; whether it is still to be run as it is."""
        self._seen[shape] += 1
        return self._seen[shape] <= self._warm_up << min(self._shortages, MOST_SHORTAGES)

    def start_anew(self, shape: Hashable | None = None) -> None:
        """Count from zero; None: for all."""
        if shape is None:
            self._seen.clear()
        else:
            self._seen[shape] = 0

    def wait_longer(self) -> None:
        """Memory ran short."""
        self._shortages += 1
        self._seen.clear()
