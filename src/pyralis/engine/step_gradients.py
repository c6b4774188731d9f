"""Where the backward of a recorded step leaves gradients: fixed memory, and what `p.grad` has to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyralis.models.gradients import FlatGradients

MOST_SHARE = 16  # gradients of more than this part of a GPU's memory are not copied


class StepGradients:
    """Fixed buffers for the gradients of everything trained, and what `p.grad` has to do with them."""

    def __init__(self, parameters: Sequence[nn.Parameter], flat: FlatGradients) -> None:
        self.parameters = tuple(parameters)
        self._views = tuple(torch.zeros_like(p) if (view := flat.view(p)) is None else view for p in self.parameters)
        # Tensors of nobody else's over the same memory: `p.grad.data =` moves a view away, what is recorded stays.
        self.places = tuple(view.view_as(view) for view in self._views)
        self._addresses = tuple(view.data_ptr() for view in self._views)
        inside = {id(p) for p in self.parameters}
        self._whole = all(id(p) in inside for p in flat.parameters)  # buffers hold nobody else's gradients
        bases = [self.places[i] if view._base is None else view._base for i, view in enumerate(self._views)]
        self._buffers = list({id(base): base for base in bases}.values())

    @contextmanager
    def bound(self) -> Iterator[None]:
        """With every `p.grad` its buffer: what is recorded then adds to it."""
        before = [p.grad for p in self.parameters]
        for i, p in enumerate(self.parameters):
            p.grad = self._home(i)
        try:
            yield
        finally:
            for p, grad in zip(self.parameters, before):
                p.grad = grad

    @contextmanager
    def aside(self) -> Iterator[None]:
        """As `bound`, with buffers that start from zero; what was accumulated in them is there again afterwards."""
        kept = [(self.places[i], self.places[i].clone()) for i in self._accumulated()]
        try:
            with self.bound(), torch.no_grad():
                torch._foreach_zero_(list(self.places))
                with torch.enable_grad():
                    yield
        finally:
            with torch.no_grad():
                for place, copy in kept:
                    place.copy_(copy)

    def can_be_kept_aside(self) -> bool:
        """Whether what has been accumulated so far is little enough to be copied."""
        size = sum(self.places[i].nbytes for i in self._accumulated())
        device = self.places[0].device if self.places else torch.device("cpu")
        return device.type != "cuda" or size * MOST_SHARE < torch.cuda.mem_get_info(device)[1]

    def _accumulated(self) -> list[int]:
        """Which buffers hold gradients that count."""
        return [i for i, p in enumerate(self.parameters) if p.grad is not None and self._is_home(i, p.grad)]

    def _is_home(self, i: int, grad: Tensor) -> bool:
        return grad.data_ptr() == self._addresses[i]

    def _home(self, i: int) -> Tensor:
        """What `p.grad` is to be: never the tensor that stands for the place here."""
        view, place = self._views[i], self.places[i]
        return view if self._is_home(i, view) else place.view_as(place)

    def prepare(self) -> list[tuple[Tensor, Tensor]]:
        """Bring buffers to where a backward adds to them. Returns (p.grad, buffer) where they are two; see `settle`."""
        fresh = [i for i, p in enumerate(self.parameters) if p.grad is None]
        pairs = () if len(fresh) == len(self.parameters) else enumerate(self.parameters)
        other = [i for i, p in pairs if p.grad is not None and not self._is_home(i, p.grad)]
        with torch.no_grad():
            if len(fresh) == len(self.parameters) and self._whole:
                torch._foreach_zero_(self._buffers)
            elif fresh or other:
                torch._foreach_zero_([self.places[i] for i in (*fresh, *other)])
        for i in fresh:
            self.parameters[i].grad = self._home(i)
        return [(grad, self.places[i]) for i in other if (grad := self.parameters[i].grad) is not None]

    @staticmethod
    def settle(apart: list[tuple[Tensor, Tensor]]) -> None:
        """Add what a backward left in buffers that are not `p.grad`."""
        if apart:
            with torch.no_grad():
                torch._foreach_add_([grad for grad, _ in apart], [buffer for _, buffer in apart])
