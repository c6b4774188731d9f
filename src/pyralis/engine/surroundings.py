"""What a forward depends on besides its arguments and the model: random states, autocast, gradient mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RandomState:
    """torch's generators of the CPU and of one device as they were. Nothing waits for the device."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None  # None on a CPU

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), gpu)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)

    def has_moved(self) -> bool:
        """Whether anything was drawn since."""
        now = RandomState.now(self.device)
        moved = not torch.equal(self.cpu, now.cpu)
        return moved or (self.gpu is not None and now.gpu is not None and not torch.equal(self.gpu, now.gpu))


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Those of one forward, for computing it again with the same dropout masks in the same dtypes."""

    random: RandomState
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Surroundings:
        kind = device.type
        return cls(RandomState.now(device), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextmanager
    def again(self) -> Iterator[RandomState]:
        """The same once more, with gradients; the random states are put back to the present afterwards."""
        present, kind = RandomState.now(self.random.device), self.random.device.type
        self.random.restore()
        try:
            with torch.enable_grad(), torch.autocast(kind, self.dtype, enabled=self.autocast):
                yield self.random
        finally:
            present.restore()
