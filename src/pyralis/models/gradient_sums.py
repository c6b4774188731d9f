"""Gradients that come in parts (tiles of tokens): summed in float32, rounded once.

Parameters in float32 take each part in `p.grad`, where it is added; a narrower gradient would be rounded with every
part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyralis.models.gradients import FlatGradients


def is_narrow(parameter: Tensor) -> bool:
    """Whether sums in the parameter's dtype are rounded more than float32's."""
    return parameter.dtype.itemsize < torch.float32.itemsize


class GradientSums(FlatGradients):
    """Stands for `flat` while parts come; `write_sums` hands on what was summed here. For one backward."""

    reusable = False

    def __init__(self, flat: FlatGradients) -> None:
        super().__init__(())
        self._flat = flat
        self._sums: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def holds(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._sums if is_narrow(parameter) else self._flat.holds(parameter)

    def target(self, parameter: nn.Parameter) -> tuple[Tensor, bool]:
        """(where its gradient goes, float32 for a narrow one; whether to add to it)."""
        if not is_narrow(parameter):
            return self._flat.target(parameter)
        known = self._sums.get(id(parameter))
        if known is not None:
            return known[1], True
        made = torch.empty_like(parameter, dtype=torch.float32)
        self._sums[id(parameter)] = parameter, made
        return made, False

    def dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return torch.float32 if is_narrow(parameter) else self._flat.dtype(parameter)

    def write_sums(self) -> None:
        for parameter, total in self._sums.values():
            self._flat.write(parameter, total)
        self._sums.clear()


def in_parts(flat: FlatGradients, parameters: Iterable[nn.Parameter]) -> FlatGradients:
    """Where gradients of these parameters go that come in parts: `flat` itself if none of them is narrow."""
    return GradientSums(flat) if any(map(is_narrow, parameters)) else flat
