"""Tensors in pinned host memory between a forward and its backward, moved on a stream of their own.

A layer's input leaves while the layer computes: `put` before it, `settle` after. It comes back while the layer after it
goes through its backward: `get` starts the copy of what was put before, for backwards run in the opposite order. So a
forward holds the input of the layer that computes and no other, a backward that of the layer before as well.

The caching allocator is not told that a second stream uses a tensor (`record_stream`): it would give its memory to
nobody before the GPU has come by, and the CPU is up to twenty layers ahead of it. What leaves is held instead until the
stream that computes has been told to wait for the copy.
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
    side: torch.cuda.Stream
    left: torch.cuda.Event  # the copy to the host is done
    tensor: Tensor | None = None  # on its way back, or there
    back: torch.cuda.Event | None = None
    before: weakref.ref[Stored] | None = None  # what was put just before, as long as its backward is to come

    def __del__(self) -> None:
        if self.tensor is not None:  # its backward never came, and the copy may still be under way
            self.tensor.record_stream(self.side)


class PinnedStore:
    """For the policy `offload_input`. Tensors that are not on a GPU stay where they are."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: weakref.ref[Stored] | None = None
        self._leaving: tuple[torch.cuda.Event, Tensor] | None = None

    def put(self, tensor: Tensor) -> Stored | Tensor:
        if not tensor.is_cuda:
            return tensor
        self.settle()
        side = self._stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            host.copy_(tensor, non_blocking=True)
            left = side.record_event()
        self._leaving = left, tensor
        stored = Stored(host, tensor.device, side, left, before=self._last)
        self._last = weakref.ref(stored)
        return stored

    def get(self, handle: object) -> Tensor:
        if isinstance(handle, Tensor):
            return handle
        assert isinstance(handle, Stored)
        self.settle()
        self._start(handle)
        previous = None if handle.before is None else handle.before()
        if previous is not None:
            self._start(previous)
        assert handle.tensor is not None
        assert handle.back is not None
        torch.cuda.current_stream(handle.device).wait_event(handle.back)
        tensor, handle.tensor = handle.tensor, None
        return tensor

    def settle(self) -> None:
        """What is on its way out need not be held: all that the computing stream does from here on comes after."""
        if self._leaving is not None:
            left, tensor = self._leaving
            torch.cuda.current_stream(tensor.device).wait_event(left)
            self._leaving = None

    def _start(self, stored: Stored) -> None:
        if stored.tensor is not None:
            return
        stored.tensor = torch.empty(stored.host.shape, dtype=stored.host.dtype, device=stored.device)
        stored.side.wait_stream(torch.cuda.current_stream(stored.device))  # whoever had this memory before is done
        stored.side.wait_event(stored.left)
        with torch.cuda.stream(stored.side):
            stored.tensor.copy_(stored.host, non_blocking=True)
            stored.back = stored.side.record_event()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
