"""How many tokens a run has seen."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TokenCounts:
    """Cumulative tokens of a run, over all processes. Kept on the device until read: reading syncs, adding does not.

    `total` leaves out the padding of padded batches; packed ones have no mask, so their little padding counts.
    """

    _supervised: int = 0
    _total: int = 0
    _pending: list[tuple[Tensor | float, Tensor | float]] = field(default_factory=list)

    def add(self, supervised: Tensor | float, total: Tensor | float) -> None:
        self._pending.append((supervised, total))
        if len(self._pending) >= 256:  # bound the number of live scalars
            self._drain()

    def _drain(self) -> None:
        for supervised, total in self._pending:
            self._supervised += int(supervised)
            self._total += int(total)
        self._pending.clear()

    @property
    def supervised(self) -> int:
        self._drain()
        return self._supervised

    @property
    def total(self) -> int:
        self._drain()
        return self._total

    def restore(self, supervised: int, total: int) -> None:
        self._pending.clear()
        self._supervised, self._total = supervised, total
