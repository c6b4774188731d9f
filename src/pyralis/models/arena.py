"""Base weights of a decoder layer as the four matrices that the fused block multiplies by.

Plain weights: the matrices that share an input (q, k, v; gate, up) lie in one buffer [N, K + P], and the parameters
become views of it: state dicts stay stock, nothing is stored twice, what writes into a parameter is seen at once.
4-bit weights stay where they are and are dequantised, a layer in a launch, into a workspace [N, K + P] that all layers
of a model share, or into one of the layer's own (`resident`) that is kept between uses.

The P last columns hold LoRA's B; `GroupState.wide` says for which group there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyralis.errors import ModelError
from pyralis.models.gradients import stacked_view
from pyralis.models.group_state import GroupState
from pyralis.ops.lora_group import stack_B
from pyralis.ops.nf4_layer import LayerPlan, Placement, dequantize_layer
from pyralis.ops.nf4_state import from_params4bit

ALIGNMENT = 256  # elements between the starts of matrices in a workspace: 512 bytes of bf16


class Base(Protocol):
    """Where the matrices come from. `plan` is what `prepare` returned for the same groups."""

    def prepare(self, groups: Sequence[GroupState], dtype: torch.dtype) -> Any: ...

    def matrices(self, groups: Sequence[GroupState], plan: Any) -> tuple[Tensor, ...]: ...

    def adapters_changed(self) -> None: ...

    def release(self) -> None: ...


@dataclass(slots=True, eq=False)
class StackedWeight:
    buffer: Tensor  # [N, K + room]
    owner: GroupState | None = None  # whose B lies in the room
    stale: bool = True


class DenseBase:
    """Plain weights, moved into stacks. A stack is made again when a parameter has been moved away from it."""

    def __init__(self) -> None:
        self._stacks: dict[int, StackedWeight] = {}

    def prepare(self, groups: Sequence[GroupState], dtype: torch.dtype) -> tuple[StackedWeight, ...]:
        for index, state in enumerate(groups):
            weights = [linear.base.weight for linear in state.linears]
            stack = self._stacks.get(index)
            room = state.columns - state.group.in_features
            if stack is None or not _holds(stack.buffer, weights, state.columns):
                self._stacks[index] = StackedWeight(_stack(weights, room))
        return tuple(self._stacks[index] for index in range(len(groups)))

    def matrices(self, groups: Sequence[GroupState], plan: tuple[StackedWeight, ...]) -> tuple[Tensor, ...]:
        found = []
        for state, stack in zip(groups, plan):
            if state.wide:
                columns = stack.buffer[:, state.group.in_features : state.columns]
                if stack.owner is not state:
                    stack_B(state.group, state.adapter_B, columns)
                elif stack.stale:
                    for j in state.group.adapted:
                        source = state.adapter_B[j]
                        assert source is not None
                        columns[state.group.rows[j], state.group.columns[j]].copy_(source)
                stack.owner, stack.stale = state, False
            found.append(stack.buffer[:, : state.columns])
        return tuple(found)

    def adapters_changed(self) -> None:
        for stack in self._stacks.values():
            stack.stale = True

    def release(self) -> None:
        self._stacks.clear()


def _holds(buffer: Tensor, weights: Sequence[nn.Parameter], columns: int) -> bool:
    """Whether the parameters are the rows of `buffer`, and it is wide enough."""
    at, step = buffer.data_ptr(), buffer.stride(0) * buffer.element_size()
    for weight in weights:
        if weight.data_ptr() != at or weight.dtype != buffer.dtype or weight.stride(0) != buffer.stride(0):
            return False
        at += weight.shape[0] * step
    return buffer.shape[1] >= columns


def _stack(weights: Sequence[nn.Parameter], room: int) -> Tensor:
    """[N, K + room] with the weights in it, which become views of it. Nothing moves where nothing has to."""
    if not room and (found := stacked_view(weights)) is not None:
        return found
    for weight in weights:
        if weight.requires_grad and weight.untyped_storage().nbytes() > weight.numel() * weight.element_size():
            raise ModelError(
                f"a trained weight of shape {list(weight.shape)} is a view of another's buffer, in which the weights "
                "that share an input do not lie side by side: order the parameters as LayerWeights.parameters has them"
            )
    first = weights[0]
    K = first.shape[1]
    buffer = torch.empty((sum(w.shape[0] for w in weights), K + room), dtype=first.dtype, device=first.device)
    start = 0
    for weight in weights:
        view = buffer[start : start + weight.shape[0], :K]
        view.copy_(weight.detach())
        weight.data = view
        start += weight.shape[0]
    return buffer


class Workspace:
    """Buffers that the layers of a model take turns to use: one for each device and dtype, as large as the largest."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.owners: dict[int, object] = {}  # by address: whose matrices a buffer holds

    def take(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < elements:
            buffer = self._buffers[device, dtype] = torch.empty(elements, dtype=dtype, device=device)
        return buffer

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()  # a copy has its own buffers, made when they are needed


@dataclass(frozen=True, slots=True, eq=False)
class DequantizePlan:
    layer: LayerPlan
    arena: Tensor
    matrices: tuple[Tensor, ...]  # [N, K + P], views of the arena
    rounded: tuple[tuple[Tensor, torch.dtype], ...]  # what bitsandbytes rounds to a narrower dtype on the way


class FourBitBase:
    """bitsandbytes' 4-bit weights. `resident`: their values are kept, in a buffer of the layer's own."""

    def __init__(self, workspace: Workspace, resident: bool) -> None:
        self._workspace = Workspace() if resident else workspace
        self._resident = resident
        self._stale = True

    def prepare(self, groups: Sequence[GroupState], dtype: torch.dtype) -> DequantizePlan:
        starts, end = [], 0
        for state in groups:
            starts.append(end)
            end += -(-state.group.out_features * state.columns // ALIGNMENT) * ALIGNMENT
        arena = self._workspace.take(end, dtype, groups[0].linears[0].base.weight.device)
        placements, matrices, rounded = [], [], []
        for state, start in zip(groups, starts):
            N, K = state.group.out_features, state.group.in_features
            whole = arena[start : start + N * state.columns].view(N, state.columns)
            matrices.append(whole)
            for linear, B, rows, columns in zip(state.linears, state.adapter_B, state.group.rows, state.group.columns):
                quantized = from_params4bit(linear.base.weight)
                lora_B = B.detach() if state.wide and B is not None else None
                placements.append(Placement(quantized, whole[rows], lora_B, columns.start if lora_B is not None else 0))
                if quantized.dtype not in (torch.float32, dtype):
                    rounded.append((whole[rows, :K], quantized.dtype))
        return DequantizePlan(LayerPlan.of(placements, arena), arena, tuple(matrices), tuple(rounded))

    def matrices(self, groups: Sequence[GroupState], plan: DequantizePlan) -> tuple[Tensor, ...]:
        owners, address = self._workspace.owners, plan.arena.data_ptr()
        held = owners.get(address) is plan
        if self._resident and held:
            if self._stale:
                dequantize_layer(plan.layer, plan.arena, weights=False)
        elif not held or self._stale or _capturing(plan.arena):
            dequantize_layer(plan.layer, plan.arena)
            for matrix, dtype in plan.rounded:
                matrix.copy_(matrix.to(dtype))
        owners[address], self._stale = plan, False
        return plan.matrices

    def adapters_changed(self) -> None:
        self._stale = True

    def release(self) -> None:
        if self._resident:
            self._workspace = Workspace()


def _capturing(tensor: Tensor) -> bool:
    """A captured graph may be replayed after another layer has used the workspace."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
