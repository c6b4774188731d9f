"""Parameters as views of one flat buffer, so that one launch can update them all.

Each parameter starts at a multiple of 256 elements from the first: an 8-bit block never straddles two of them. What
lies between the end of a parameter and the next multiple of 256 is padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.errors import ModelError
from pyralis.ops.adamw_8bit import BLOCK


@dataclass(frozen=True, slots=True)
class FlatLayout:
    values: Tensor  # [n]: the buffer
    offsets: tuple[int, ...]  # where each parameter starts in it, in the order of the parameters
    sizes: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return -(-self.values.numel() // BLOCK)

    def part(self, i: int) -> slice:
        """Elements of parameter i."""
        return slice(self.offsets[i], self.offsets[i] + self.sizes[i])

    def block_part(self, i: int) -> slice:
        """Blocks of parameter i."""
        return slice(self.offsets[i] // BLOCK, -(-(self.offsets[i] + self.sizes[i]) // BLOCK))


def flatten_parameters(parameters: Sequence[Tensor]) -> Tensor:
    """Move parameters of one dtype and device into a new buffer and make them views of it; returns it, [n].

    Raises ModelError for parameters of several dtypes or devices.
    """
    _check_alike(parameters)
    starts, end = [], 0
    for p in parameters:
        starts.append(end)
        end += -(-p.numel() // BLOCK) * BLOCK
    values = torch.zeros(end, dtype=parameters[0].dtype, device=parameters[0].device)
    for p, start in zip(parameters, starts):
        view = values[start : start + p.numel()].view(p.shape)
        view.copy_(p.detach())
        p.data = view
    return values


@torch.no_grad()
def take_back(parameters: Sequence[Tensor], layout: FlatLayout) -> None:
    """Make parameters that were moved out of the buffer since views of it again, with the values that they have now."""
    for i, p in enumerate(parameters):
        view = layout.values[layout.part(i)].view(p.shape)
        if p.data_ptr() != view.data_ptr():
            view.copy_(p)
            p.data = view


def locate(parameters: Sequence[Tensor]) -> FlatLayout:
    """Find the buffer that all parameters are views of.

    Raises ModelError if there is none or a parameter does not start at a multiple of 256 elements in it.
    """
    _check_alike(parameters)
    storage = parameters[0].untyped_storage()
    for i, p in enumerate(parameters):
        if p.untyped_storage().data_ptr() != storage.data_ptr():
            raise ModelError(
                f"parameter {i} of shape {list(p.shape)} does not lie in the buffer of parameter 0: make them views "
                f"of one with flatten_parameters(parameters), after the last .to(), .half() or `.data =` on the model"
            )
        if not p.is_contiguous():
            raise ModelError(f"parameter {i} of shape {list(p.shape)} is not contiguous: call flatten_parameters")
    first = min(p.storage_offset() for p in parameters)
    offsets = tuple(int(p.storage_offset() - first) for p in parameters)
    order = sorted(range(len(parameters)), key=offsets.__getitem__)
    for i, following in zip(order, [*order[1:], None]):
        end = offsets[i] + parameters[i].numel()
        if offsets[i] % BLOCK or (following is not None and offsets[following] < end):
            raise ModelError(
                f"parameter {i} of shape {list(parameters[i].shape)} lies at elements {offsets[i]} to {end} of the "
                f"buffer; expected a start at a multiple of {BLOCK} and no overlap: call flatten_parameters"
            )
    end = max(offset + p.numel() for offset, p in zip(offsets, parameters))
    room = storage.nbytes() // parameters[0].element_size() - first
    n = min(-(-end // BLOCK) * BLOCK, room)  # whole blocks where there is padding: wider accesses
    values = parameters[0].detach().new_empty(0).set_(storage, first, (n,), (1,))
    return FlatLayout(values, offsets, tuple(p.numel() for p in parameters))


def to_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, each in memory of its own on the host; what was one and the same tensor is so there."""
    copies: dict[tuple[object, ...], Tensor] = {}
    found = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        found[name] = copies[place]
    return found


def _check_alike(parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise ModelError("there are no parameters to train; is requires_grad False everywhere?")
    kinds = sorted({f"{p.dtype} on {p.device}" for p in parameters})
    if len(kinds) > 1:
        raise ModelError(f"parameters of one flat buffer have one dtype and device; given: {', '.join(kinds)}")
