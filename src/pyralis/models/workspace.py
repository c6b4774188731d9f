"""Base weights whose values are made when they are needed: dequantised, or cast as autocast would cast them.

All layers of a model take turns to use one workspace, in which a layer's four matrices [N + P, K + P] lie side by side,
or each in the place of the one before (`residency.py`); or a layer has one of its own, in which they are kept between
uses. LoRA's B goes beside them, and its A below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pyralis.models.adapters import LinearState
from pyralis.models.group_state import GroupState
from pyralis.models.residency import Residency
from pyralis.ops.nf4_layer import dequantize_layer
from pyralis.ops.nf4_plan import Copy, LayerPlan, Placement
from pyralis.ops.nf4_state import from_params4bit

ALIGNMENT = 256  # elements between the starts of matrices: 512 bytes of bf16


class Workspace:
    """One buffer for each device, dtype and residency, as large as the largest layer has needed, for as long as a plan
    holds it."""

    def __init__(self) -> None:
        self._buffers: WeakValueDictionary[tuple[torch.device, torch.dtype, Residency], Tensor]
        self._buffers = WeakValueDictionary()
        self.owners: WeakValueDictionary[int, WorkspacePlan]  # by address: the plan whose matrices a buffer holds
        self.owners = WeakValueDictionary()

    def take(self, elements: int, dtype: torch.dtype, device: torch.device, residency: Residency) -> Tensor:
        key = device, dtype, residency
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < elements:
            if buffer is not None:
                self.owners.pop(buffer.data_ptr(), None)
            self._buffers[key] = buffer = torch.empty(elements, dtype=dtype, device=device)
        return buffer

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()  # a copy has its own buffers, made when they are needed


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class WorkspacePlan:
    arena: Tensor
    matrices: tuple[Tensor, ...]  # [N + P, K + P], views of the arena
    made_by: Any  # what the base needs to fill them


class InTurn(Sequence[Tensor]):
    """A layer's matrices, each made when it is asked for, over the one before."""

    def __init__(self, base: WorkspaceBase, plans: Sequence[WorkspacePlan]) -> None:
        self._base, self._plans = base, plans

    def __len__(self) -> int:
        return len(self._plans)

    def __getitem__(self, index: Any) -> Any:
        (matrix,) = self._base.made(self._plans[index])
        return matrix


class WorkspaceBase:
    """What 4-bit and cast weights share. `fill` makes a plan's matrices, `refill` what of them a refresh may change."""

    def __init__(self, workspace: Workspace, residency: Residency) -> None:
        self._resident, self._residency = residency == "kept", residency
        self._workspace = Workspace() if self._resident else workspace
        self._stale = True

    def prepare(self, groups: Sequence[GroupState], dtype: torch.dtype) -> tuple[WorkspacePlan, ...]:
        """One plan for all of them, or in turn one for each."""
        if self._residency != "in turn":
            return (self._prepared(groups, dtype),)
        largest = max(groups, key=lambda state: state.rows * state.columns)
        _room = self._prepared([largest], dtype)  # so that the buffer is made once
        return tuple(self._prepared([group], dtype) for group in groups)

    def _prepared(self, groups: Sequence[GroupState], dtype: torch.dtype) -> WorkspacePlan:
        starts, end = [], 0
        for state in groups:
            starts.append(end)
            end += -(-state.rows * state.columns // ALIGNMENT) * ALIGNMENT
        device = groups[0].linears[0].base.weight.device
        arena = self._workspace.take(end, dtype, device, self._residency)
        matrices = tuple(
            arena[start : start + state.rows * state.columns].view(-1, state.columns)
            for state, start in zip(groups, starts)
        )
        return WorkspacePlan(arena, matrices, self.plan(groups, matrices, arena))

    def matrices(self, groups: Sequence[GroupState], plan: tuple[WorkspacePlan, ...]) -> Sequence[Tensor]:
        if not self._resident and _capturing(plan[0].arena):
            # the graph may be replayed after another layer has used the workspace
            self._workspace.owners.pop(plan[0].arena.data_ptr(), None)
        return InTurn(self, plan) if self._residency == "in turn" else self.made(plan[0])

    def made(self, plan: WorkspacePlan) -> tuple[Tensor, ...]:
        """The matrices of a plan, in their place and up to date."""
        owners, address = self._workspace.owners, plan.arena.data_ptr()
        if owners.get(address) is not plan:
            self.fill(plan)
        elif self._stale:
            self.refill(plan)
        owners[address], self._stale = plan, False
        return plan.matrices

    def kept(self, groups: Sequence[GroupState], plan: tuple[WorkspacePlan, ...]) -> bool:
        return not self._resident or self._workspace.owners.get(plan[0].arena.data_ptr()) is plan[0]

    def forget(self, *, resident: bool) -> None:
        if resident or not self._resident:
            self._workspace.owners.clear()

    def adapters_changed(self) -> None:
        self._stale = True

    def plan(self, groups: Sequence[GroupState], matrices: Sequence[Tensor], arena: Tensor) -> Any:
        raise NotImplementedError

    def fill(self, plan: WorkspacePlan) -> None:
        raise NotImplementedError

    def refill(self, plan: WorkspacePlan) -> None:
        raise NotImplementedError


def _parts(
    groups: Sequence[GroupState], matrices: Sequence[Tensor]
) -> Iterator[tuple[LinearState, Tensor, Tensor | None, int]]:
    """(linear layer, its rows [n, K + P] of a matrix, its B if it lies there, B's first column of the P)."""
    for state, matrix in zip(groups, matrices):
        for linear, B, rows, columns in zip(state.linears, state.adapter_B, state.group.rows, state.group.columns):
            beside = state.wide and B is not None
            yield linear, matrix[rows], B.detach() if beside and B is not None else None, columns.start if beside else 0


def _below(groups: Sequence[GroupState], matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(A's compute copy [P, K], its rows of a matrix) where A lies there."""
    found = []
    for state, matrix in zip(groups, matrices):
        if state.wide and state.A is not None:
            found.append((state.A, matrix[state.group.out_features :, : state.group.in_features]))
    return found


class FourBitBase(WorkspaceBase):
    """bitsandbytes' 4-bit weights, which stay where they are: a launch makes all matrices of a layer."""

    def plan(
        self, groups: Sequence[GroupState], matrices: Sequence[Tensor], arena: Tensor
    ) -> tuple[LayerPlan, list[tuple[Tensor, torch.dtype]]]:
        placements, rounded = [], []
        for linear, rows, B, column in _parts(groups, matrices):
            quantized = from_params4bit(linear.base.weight)
            placements.append(Placement(quantized, rows, B, column))
            if quantized.dtype not in (torch.float32, arena.dtype):  # bitsandbytes rounds to it on the way
                rounded.append((rows[:, : quantized.shape[1]], quantized.dtype))
        return LayerPlan.of(placements, arena, [Copy(*pair) for pair in _below(groups, matrices)]), rounded

    def fill(self, plan: WorkspacePlan) -> None:
        layer, rounded = plan.made_by
        dequantize_layer(layer, plan.arena)
        for matrix, dtype in rounded:
            matrix.copy_(matrix.to(dtype))

    def refill(self, plan: WorkspacePlan) -> None:
        dequantize_layer(plan.made_by[0], plan.arena, weights=False)


class CastBase(WorkspaceBase):
    """Plain weights of another dtype than products are made in, as float32 masters under autocast."""

    def plan(
        self, groups: Sequence[GroupState], matrices: Sequence[Tensor], arena: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        targets, sources = [], []
        for linear, rows, B, column in _parts(groups, matrices):
            weight = linear.base.weight.detach()
            targets.append(rows[:, : weight.shape[1]])
            sources.append(weight)
            if B is not None:
                targets.append(rows[:, weight.shape[1] + column :][:, : B.shape[1]])
                sources.append(B)
        for A, rows in _below(groups, matrices):
            targets.append(rows)
            sources.append(A)
        room = [matrix[:, state.group.in_features :] for state, matrix in zip(groups, matrices) if state.wide]
        return targets, sources, room

    def fill(self, plan: WorkspacePlan) -> None:
        targets, sources, room = plan.made_by
        for columns in room:
            columns.zero_()
        torch._foreach_copy_(targets, sources)

    def refill(self, plan: WorkspacePlan) -> None:
        targets, sources, _ = plan.made_by
        torch._foreach_copy_(targets, sources)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
