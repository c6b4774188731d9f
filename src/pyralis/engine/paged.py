"""Optimizer states in memory that the GPU's driver moves: on the GPU while there is room, in host memory when not.

CUDA's managed memory, as bitsandbytes allocates it for its paged optimizers. Pages move when a kernel touches them, and
stay where they are until the room is needed: nothing is slower while everything fits.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional
import torch
from torch import Tensor

PAGED_FROM = 100_000  # elements: smaller states are not worth a page of their own


def paged_zeros(n: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[n] zeros on a GPU whose memory is managed; plain ones below PAGED_FROM elements and on other devices."""
    device = torch.device(device)
    if device.type != "cuda" or n < PAGED_FROM:
        return torch.zeros(n, dtype=dtype, device=device)
    host: Any = bitsandbytes.functional.get_paged(n * dtype.itemsize, dtype=torch.uint8, device=device)
    return torch.as_tensor(_OnDevice(host), device=device).view(dtype).zero_()


class _OnDevice:
    """Managed memory has one address: what bitsandbytes returns as a CPU's tensor, told to torch as a GPU's."""

    def __init__(self, host: Tensor) -> None:
        self.host = host  # kept for as long as the GPU's tensor lives
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape), "typestr": "|u1", "data": (host.data_ptr(), False), "version": 3,
        }  # fmt: skip
