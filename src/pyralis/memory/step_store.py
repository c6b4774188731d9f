"""The host memory of `offload_input` inside a recorded step.

A CUDA graph copies from and to fixed addresses, and pinned memory cannot be taken while one is captured: buffers are
made while steps are run as usual (`reserving`), and serve all recorded ones. Nor can the caching allocator be told that
another stream still reads a tensor (`record_stream`): it would keep all such memory to the end of the capture. So a
tensor on its way to the host is held until the stream that computes has been told to wait for its copy, which is when
the layer has computed, as in `offload.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyralis.models.policy import InputStore


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor that was put away, the `index`-th since the last `join`."""

    index: int
    host: Tensor
    device: torch.device
    tensor: Tensor | None = None  # on its way back, or there
    back: torch.cuda.Event | None = None


class StepStore:
    """One for all recorded steps of a model, which never overlap. Tensors that are not on a GPU stay where they are."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: tuple[torch.cuda.Event, Tensor] | None = None
        self._away: list[Stored] = []

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers)

    def begin(self) -> None:
        """A forward starts, whatever became of the one before."""
        self._leaving = None
        self._away.clear()

    def reserving(self, store: InputStore) -> InputStore:
        """For one forward: `store`, while this one makes sure of the room that it would need."""
        return _Reserving(self, store)

    def reserve(self, index: int, size: int) -> None:
        """Room for `size` bytes. Who still copies from or to a smaller buffer has to hold it."""
        if index == len(self._buffers):
            self._buffers.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
        elif self._buffers[index].numel() < size:
            self._buffers[index] = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def put(self, tensor: Tensor) -> Stored | Tensor:
        if not tensor.is_cuda:
            return tensor
        self.settle()
        side = self._stream(tensor.device)
        stored = Stored(len(self._away), self._buffer(len(self._away), tensor), tensor.device)
        self._away.append(stored)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            stored.host.copy_(tensor, non_blocking=True)
            self._leaving = side.record_event(), tensor
        return stored

    def get(self, handle: object) -> Tensor:
        if isinstance(handle, Tensor):
            return handle
        assert isinstance(handle, Stored)
        self._start(handle)
        if handle.index:  # what is wanted next comes while the caller computes
            self._start(self._away[handle.index - 1])
        assert handle.tensor is not None
        assert handle.back is not None
        torch.cuda.current_stream(handle.device).wait_event(handle.back)
        tensor, handle.tensor = handle.tensor, None
        return tensor

    def join(self) -> None:
        """The stream that computes waits for all copies under way: at the end of a forward, and of its backward."""
        self.settle()
        for stored in self._away:
            if stored.tensor is not None and stored.back is not None:
                torch.cuda.current_stream(stored.device).wait_event(stored.back)
                stored.tensor = None

    def settle(self) -> None:
        if self._leaving is not None:
            left, tensor = self._leaving
            torch.cuda.current_stream(tensor.device).wait_event(left)
            self._leaving = None

    def _start(self, stored: Stored) -> None:
        if stored.back is not None:
            return
        side, now = self._stream(stored.device), torch.cuda.current_stream(stored.device)
        stored.tensor = torch.empty(stored.host.shape, dtype=stored.host.dtype, device=stored.device)
        side.wait_stream(now)  # whoever had this memory before is done with it
        with torch.cuda.stream(side):
            stored.tensor.copy_(stored.host, non_blocking=True)
            stored.back = side.record_event()

    def _buffer(self, index: int, tensor: Tensor) -> Tensor:
        """Host memory of the tensor's shape and dtype."""
        assert index < len(self._buffers), "a step is recorded that was not run before"
        return self._buffers[index][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


@dataclass(eq=False)
class _Reserving:
    """One forward through another store."""

    steps: StepStore
    store: InputStore
    index: int = field(default=0, init=False)

    def settle(self) -> None:
        self.store.settle()

    def put(self, tensor: Tensor) -> object:
        if tensor.is_cuda:
            self.steps.reserve(self.index, tensor.nbytes)
            self.index += 1
        return self.store.put(tensor)

    def get(self, handle: object) -> Tensor:
        return self.store.get(handle)
