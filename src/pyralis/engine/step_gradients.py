"""Where the backward of a recorded step leaves gradients: fixed memory, and what `p.grad` has to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyralis.models.gradients import FlatGradients


class StepGradients:
    """Fixed buffers for the gradients of everything trained, and what `p.grad` has to do with them."""

    def __init__(self, parameters: Sequence[nn.Parameter], flat: FlatGradients) -> None:
        self.parameters = tuple(parameters)
        self.views = tuple(torch.zeros_like(p) if (view := flat.view(p)) is None else view for p in self.parameters)
        inside = {id(p) for p in self.parameters}
        self._whole = all(id(p) in inside for p in flat.parameters)  # buffers hold nobody else's gradients
        self._buffers = list({id(b): b for v in self.views for b in [v if v._base is None else v._base]}.values())

    @contextmanager
    def bound(self) -> Iterator[None]:
        """With every `p.grad` its buffer: what is recorded then adds to it."""
        before = [p.grad for p in self.parameters]
        for p, view in zip(self.parameters, self.views):
            p.grad = view
        try:
            yield
        finally:
            for p, grad in zip(self.parameters, before):
                p.grad = grad

    def prepare(self) -> list[tuple[Tensor, Tensor]]:
        """Bring buffers to where a backward adds to them. Returns (p.grad, buffer) where they are two; see `settle`."""
        fresh = [i for i, p in enumerate(self.parameters) if p.grad is None]
        pairs = () if len(fresh) == len(self.parameters) else zip(self.parameters, self.views)
        other = [i for i, (p, view) in enumerate(pairs) if p.grad is not None and p.grad is not view]
        with torch.no_grad():
            if len(fresh) == len(self.parameters) and self._whole:
                torch._foreach_zero_(self._buffers)
            elif fresh or other:
                torch._foreach_zero_([self.views[i] for i in (*fresh, *other)])
        for i in fresh:
            self.parameters[i].grad = self.views[i]
        return [(grad, self.views[i]) for i in other if (grad := self.parameters[i].grad) is not None]

    @staticmethod
    def settle(apart: list[tuple[Tensor, Tensor]]) -> None:
        """Add what a backward left in buffers that are not `p.grad`."""
        if apart:
            with torch.no_grad():
                torch._foreach_add_([grad for grad, _ in apart], [buffer for _, buffer in apart])
