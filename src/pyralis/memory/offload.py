"""Tensors in pinned host memory between a forward and its backward, moved on a stream of their own.

A layer's input leaves while the layer computes. It comes back while the layer after it goes through its backward: `get`
starts the copy of what was put before, for backwards run in the opposite order.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, eq=False, weakref_slot=True)
class Stored:
    """A tensor that was put away."""

    host: Tensor
    device: torch.device
    left: torch.cuda.Event  # the copy to the host is done
    tensor: Tensor | None = None  # on its way back, or there
    back: torch.cuda.Event | None = None
    before: weakref.ref[Stored] | None = None  # what was put just before, as long as its backward is to come


class PinnedStore:
    """For the policy `offload_input`. Tensors that are not on a GPU stay where they are."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: weakref.ref[Stored] | None = None

    def put(self, tensor: Tensor) -> Stored | Tensor:
        if not tensor.is_cuda:
            return tensor
        side, now = self._stream(tensor.device), torch.cuda.current_stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            host.copy_(tensor, non_blocking=True)
            left = side.record_event()
        tensor.record_stream(side)  # its memory is given to nobody before the copy is done
        stored = Stored(host, tensor.device, left, before=self._last)
        self._last = weakref.ref(stored)
        return stored

    def get(self, handle: object) -> Tensor:
        if isinstance(handle, Tensor):
            return handle
        assert isinstance(handle, Stored)
        self._start(handle)
        previous = None if handle.before is None else handle.before()
        if previous is not None:
            self._start(previous)
        assert handle.tensor is not None
        assert handle.back is not None
        torch.cuda.current_stream(handle.device).wait_event(handle.back)
        tensor, handle.tensor = handle.tensor, None
        return tensor

    def _start(self, stored: Stored) -> None:
        if stored.tensor is not None:
            return
        side, now = self._stream(stored.device), torch.cuda.current_stream(stored.device)
        stored.tensor = torch.empty(stored.host.shape, dtype=stored.host.dtype, device=stored.device)
        side.wait_stream(now)  # whoever had this memory before is done with it
        side.wait_event(stored.left)
        with torch.cuda.stream(side):
            stored.tensor.copy_(stored.host, non_blocking=True)
            stored.back = side.record_event()
        stored.tensor.record_stream(side)  # should its backward never come

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
