"""What the losses share: their settings, what is kept of each row, and the division by the number of items.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyralis.errors import ConfigError
from pyralis.ops._triton import at_least_float32

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What stands between the logits and the loss; the defaults are plain cross entropy."""

    softcap: float | None = None  # Gemma 2's `final_logit_softcapping`
    logit_scale: float = 1.0  # Cohere's `logit_scale`, 1 / Granite's `logits_scaling`
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ConfigError(f"softcap is {self.softcap}; expected a positive number, or None for no softcap")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; expected 0 <= label_smoothing < 1")
        if not self.z_loss >= 0:
            raise ConfigError(f"z_loss is {self.z_loss}; expected 0 (off) or a small positive number such as 1e-4")


PLAIN = LossSettings()


class RowLosses(NamedTuple):
    """What the forward leaves, [n] float32 each; lse = maximum + log(total)."""

    loss: Tensor
    maximum: Tensor  # max of z
    total: Tensor  # sum of exp(z - maximum)

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> RowLosses:
        return cls(*torch.empty((3, rows), dtype=at_least_float32(like.dtype), device=like.device).unbind())

    def rows(self, part: slice) -> RowLosses:
        return RowLosses(*(t[part] for t in self))


def transform(logits: Tensor, settings: LossSettings = PLAIN) -> Tensor:
    """z of the equations of `cross_entropy.py`, in float32 (float64 of float64 logits)."""
    z = logits.to(at_least_float32(logits.dtype)) * settings.logit_scale
    return z if settings.softcap is None else settings.softcap * torch.tanh(z / settings.softcap)


def item_count(num_items: Tensor | float | None, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the summed loss is divided by: [] of `dtype` on the labels' device, 1 in place of 0."""
    if num_items is None:
        items = (labels != IGNORE_INDEX).sum(dtype=dtype)
    elif isinstance(num_items, Tensor):
        items = num_items.to(labels.device, dtype).reshape(())
    else:
        items = torch.full((), float(num_items), dtype=dtype, device=labels.device)
    return items + (items == 0)


def mean_loss(losses: Tensor, items: Tensor) -> Tensor:
    """sum(losses) / items, in the losses' dtype; summed in float64, where the order does not show."""
    return (losses.sum(dtype=torch.float64) / items).to(losses.dtype)
