"""A GPU that is not there, and memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from pyralis.memory.auto import Device
from pyralis.memory.gpus import GpuRates
from pyralis.models import block

RATES = GpuRates("pretended", 1 << 34, 1e12, 1e14, 1e10, launch_seconds=0.0)


def pretended(budget: int) -> Callable[[torch.device], Device]:
    """For `Planner(look=...)`."""
    return lambda device: Device(RATES, budget, 0)


class Full:
    """Out of memory in the backward of the first layer, whose gradients come last, while it keeps more than allowed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: Collection[str]) -> None:
        self.failures = 0
        self.error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        whole = block.block_backward

        def backward(c: Any, a: Any, x: Any, layout: Any, flat: Any, dy: Any, policy: Any) -> Any:
            first = c.state.qkv.stream == 0
            if first and policy not in allowed:
                self.failures += 1
                dy.fill_(torch.nan)
                raise type(self.error)(*self.error.args)
            return whole(c, a, x, layout, flat, dy, policy)

        monkeypatch.setattr(block, "block_backward", backward)
