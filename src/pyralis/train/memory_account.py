"""What a run's memory holds, counted from its tensors while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from pyralis.engine.optimizer import FlatAdamW


@dataclass(frozen=True, slots=True)
class MemoryAccount:
    """Bytes on the device that trains, shared storage once.

    Attributes:
        weights: of the model, with the scales of quantised ones; what is trained of a whole model included.
        adapters: what is trained beside frozen weights.
        gradients: while the optimizer steps; 0 where the backward has given them up by then.
        optimizer: states after the first step.
    """

    weights: int
    adapters: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer


class MemoryCount(TrainerCallback):
    """Counts in the first step of a run. `found` is None before, and where processes hold parts of the model."""

    def __init__(self, device: torch.device, *, in_parts: bool = False) -> None:
        self.device, self.in_parts = device, in_parts
        self.found: MemoryAccount | None = None

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, optimizer: Any = None, **__: Any) -> None:
        if self.found is not None or self.in_parts:
            return
        seen: set[int] = set()
        adapters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
        trained = self._bytes(adapters, seen)
        weights = self._bytes(_weights(model), seen)
        self.found = MemoryAccount(weights, trained, self._bytes(_gradients(model, optimizer), seen))

    def on_step_end(self, *_: Any, model: Any = None, optimizer: Any = None, **__: Any) -> None:
        if self.found is not None and not self.found.optimizer:
            inner = getattr(optimizer, "optimizer", optimizer)
            seen: set[int] = set()
            self._bytes((*_weights(model), *_gradients(model, optimizer)), seen)
            self.found = replace(self.found, optimizer=self._bytes(_tensors(inner.state), seen))

    def _bytes(self, tensors: Iterable[Tensor], seen: set[int]) -> int:
        """Of their storages on the device that are not `seen`, which are then."""
        total = 0
        for tensor in tensors:
            if tensor.device.type != self.device.type:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total


def _weights(model: Any) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        if (state := getattr(tensor, "quant_state", None)) is not None:
            yield from _tensors(vars(state))


def _gradients(model: Any, optimizer: Any) -> Iterator[Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, FlatAdamW):
        yield inner.grads
    yield from (p.grad for p in model.parameters() if p.grad is not None)


def _tensors(value: Any) -> Iterator[Tensor]:
    """In dictionaries, lists and nested quantisation states."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif type(value).__name__ == "QuantState":
        yield from _tensors(vars(value))
