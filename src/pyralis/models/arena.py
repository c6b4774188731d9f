"""Base weights of a decoder layer as the four matrices that the fused block multiplies by.

Plain weights: the matrices that share an input (q, k, v; gate, up) lie in one buffer [N, K + P], and the parameters
become views of it: state dicts stay stock, nothing is stored twice, what writes into a parameter is seen at once.
Weights whose values have to be made first, 4-bit ones and those that autocast casts, are in `workspace.py`.

The P last columns hold LoRA's B, and P rows more its A; `GroupState.wide` says for which group there are any.
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


class Base(Protocol):
    """Where the matrices come from. `plan` is what `prepare` returned for the same groups."""

    def prepare(self, groups: Sequence[GroupState], dtype: torch.dtype) -> Any: ...

    def matrices(self, groups: Sequence[GroupState], plan: Any) -> Sequence[Tensor]: ...

    def adapters_changed(self) -> None: ...

    def kept(self, groups: Sequence[GroupState], plan: Any) -> bool:
        """Whether what `matrices` makes once for many uses is there."""

    def forget(self, *, resident: bool) -> None:
        """What lies in shared memory (resident: in any) is not what was made last: a graph was recorded or replayed."""


@dataclass(slots=True, eq=False)
class StackedWeight:
    buffer: Tensor  # [N + room, K + room]
    owner: GroupState | None = None  # whose B and A lie in the room
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
                self._stacks[index] = StackedWeight(_stack(weights, room, None if stack is None else stack.buffer))
        return tuple(self._stacks[index] for index in range(len(groups)))

    def matrices(self, groups: Sequence[GroupState], plan: tuple[StackedWeight, ...]) -> tuple[Tensor, ...]:
        found = []
        for state, stack in zip(groups, plan):
            if state.wide and (stack.owner is not state or stack.stale):
                N, K = state.group.out_features, state.group.in_features
                columns = stack.buffer[:N, K : state.columns]
                if stack.owner is not state:
                    stack_B(state.group, state.adapter_B, columns)
                else:
                    for j in state.group.adapted:
                        source = state.adapter_B[j]
                        assert source is not None
                        columns[state.group.rows[j], state.group.columns[j]].copy_(source)
                assert state.A is not None
                stack.buffer[N : state.rows, :K].copy_(state.A)
                stack.owner, stack.stale = state, False
            whole = stack.buffer.shape == (state.rows, state.columns)
            found.append(stack.buffer if whole else stack.buffer[: state.rows, : state.columns])
        return tuple(found)

    def adapters_changed(self) -> None:
        for stack in self._stacks.values():
            stack.stale = True

    def kept(self, groups: Sequence[GroupState], plan: tuple[StackedWeight, ...]) -> bool:
        return all(stack.owner is state for state, stack in zip(groups, plan) if state.wide)

    def forget(self, *, resident: bool) -> None:
        if resident:
            for stack in self._stacks.values():
                stack.owner = None


def _holds(buffer: Tensor, weights: Sequence[nn.Parameter], columns: int) -> bool:
    """Whether the parameters are the rows of `buffer`, and it is wide enough."""
    at, step = buffer.data_ptr(), buffer.stride(0) * buffer.element_size()
    for weight in weights:
        if weight.data_ptr() != at or weight.dtype != buffer.dtype or weight.stride(0) != buffer.stride(0):
            return False
        at += weight.shape[0] * step
    return buffer.shape[1] >= columns


def _stack(weights: Sequence[nn.Parameter], room: int, before: Tensor | None) -> Tensor:
    """[N + room, K + room] with the weights in it, which become views of it. Nothing moves where nothing has to.

    before: the stack that some of them may still lie in.
    """
    if not room and (found := stacked_view(weights)) is not None:
        return found
    for weight in weights:
        storage = weight.untyped_storage()
        is_ours = before is not None and storage.data_ptr() == before.untyped_storage().data_ptr()
        if weight.requires_grad and not is_ours and storage.nbytes() > weight.numel() * weight.element_size():
            raise ModelError(
                f"a trained weight of shape {list(weight.shape)} is a view of another's buffer, in which the weights "
                "that share an input do not lie side by side: order the parameters as LayerWeights.parameters has them"
            )
    first = weights[0]
    K = first.shape[1]
    rows = sum(w.shape[0] for w in weights) + room
    buffer = torch.empty((rows, K + room), dtype=first.dtype, device=first.device)
    start = 0
    for weight in weights:
        view = buffer[start : start + weight.shape[0], :K]
        view.copy_(weight.detach())
        weight.data = view
        start += weight.shape[0]
    return buffer
