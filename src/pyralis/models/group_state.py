"""Linear layers that share their input, under one state of their adapters: shapes, compute copies, what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyralis.models.adapters import LinearState
from pyralis.models.gradients import TrainedGroup
from pyralis.models.spec import Projection
from pyralis.ops._triton import Gpu, at_least_float32, gpu_of
from pyralis.ops.lora_group import LoraGroup, LoraProjection, combine_bias, concatenates
from pyralis.ops.lora_weight import LoraWeight


@dataclass(frozen=True, slots=True)
class LayoutOptions:
    """How weights are laid out.

    Attributes:
        concatenate: B beside W and A below it. None: never with plain weights, and with 4-bit and cast ones where the
            GPU gains by it at `tokens`, of a usual micro-batch (`concatenates`). Plain weights with room for B between
            their rows are not contiguous, and stock `save_pretrained` of the whole model then fails: `release` them
            before it.
        resident: keep dequantised and cast weights instead of making them for each use.
    """

    concatenate: bool | None = None
    resident: bool = False
    tokens: int = 4096


@dataclass(frozen=True, slots=True, eq=False)
class DoraState:
    """What DoRA multiplies a group's features by, brought up to date at the start of a forward."""

    magnitude: tuple[nn.Parameter | None, ...]  # of each projection, [N_j]
    norm: Tensor  # [N] float32, of the rows of W + s B A; 1 without adapter
    ratio: Tensor  # [N] float32, magnitude / norm


@dataclass(frozen=True, slots=True, eq=False)
class GroupState:
    """Linear layers that share their input, and what belongs to the adapters that are active on them."""

    group: LoraGroup
    linears: tuple[LinearState, ...]
    wide: bool  # B lies beside W, and A below it
    A: Tensor | None  # [P, K] in the compute dtype
    B: tuple[Tensor | None, ...] | None  # in the compute dtype, where they do not lie beside W
    bias: Tensor | None  # [N]
    stream: int  # of the first adapter's dropout
    trained: TrainedGroup
    dora: DoraState | None = None
    views: list[LoraWeight] = field(default_factory=list)  # at most one: of the matrix last asked for

    @property
    def columns(self) -> int:
        """K + P, or K."""
        return self.group.width if self.wide else self.group.in_features

    @property
    def rows(self) -> int:
        """N + P, or N."""
        return self.group.height if self.wide else self.group.out_features

    def weight(self, matrix: Tensor) -> LoraWeight:
        """The views of one of `Base.matrices`, made once."""
        if not self.views or self.views[0].whole is not matrix:
            self.views[:] = [LoraWeight.of(self.group, matrix, self.B)]
        return self.views[0]

    @property
    def adds_biases(self) -> bool:
        return any(linear.adapter is not None and linear.adapter.bias is not None for linear in self.linears)

    @property
    def adapter_B(self) -> tuple[Tensor | None, ...]:
        return tuple(None if linear.adapter is None else linear.adapter.B for linear in self.linears)


def group_layout(
    parts: Sequence[Projection],
    linears: Sequence[LinearState],
    dtype: torch.dtype,
    options: LayoutOptions,
    gpu: Gpu,
    *,
    four_bit: bool | None = None,
) -> tuple[LoraGroup, bool]:
    """(the group of linear layers `parts`, whether LoRA's B lies beside W and A below it).

    four_bit: whether the weights are to be so, where `linears` only stand for them; None: as they are.
    """
    group = LoraGroup(
        parts[0].in_features,
        tuple(
            LoraProjection(p.out_features)
            if (a := linear.adapter) is None
            else LoraProjection(p.out_features, a.rank, a.scale, a.dropout)
            for p, linear in zip(parts, linears)
        ),
        dora=any(linear.adapter is not None and linear.adapter.magnitude is not None for linear in linears),
    )
    weights = [linear.base.weight for linear in linears]
    chosen = options.concatenate
    if chosen is None:
        is_copied = (linears[0].four_bit if four_bit is None else four_bit) or dtype != weights[0].dtype
        chosen = is_copied and concatenates(group, options.tokens, gpu, dtype.itemsize)
    return group, chosen and group.rank > 0 and not any(w.requires_grad for w in weights)


def build_group(
    parts: Sequence[Projection], linears: Sequence[LinearState], dtype: torch.dtype, stream: int, options: LayoutOptions
) -> GroupState:
    """The state of linear layers `parts`, which are now as `linears` say; copies of adapters are not filled yet."""
    adapters = [linear.adapter for linear in linears]
    device = linears[0].base.weight.device
    group, wide = group_layout(parts, linears, dtype, options, gpu_of(device))
    copies = None if wide or not group.rank else tuple(
        None if a is None else torch.empty(a.B.shape, dtype=dtype, device=device) for a in adapters
    )  # fmt: skip
    A = torch.zeros((group.pad, group.in_features), dtype=dtype, device=device) if group.rank else None
    biased = any(linear.base.bias is not None for linear in linears) or any(a and a.bias is not None for a in adapters)
    bias = torch.zeros(group.out_features, dtype=dtype, device=device) if biased else None
    trained = TrainedGroup(
        weights=tuple(_trained(linear.base.weight) for linear in linears),
        biases=tuple(_trained(linear.base.bias) for linear in linears),
        A=tuple(_trained(None if a is None else a.A) for a in adapters),
        B=tuple(_trained(None if a is None else a.B) for a in adapters),
        lora_biases=tuple(_trained(None if a is None else a.bias) for a in adapters),
        magnitudes=tuple(_trained(None if a is None else a.magnitude) for a in adapters),
    )
    dora = None
    if group.dora:
        norm = torch.ones(group.out_features, dtype=at_least_float32(dtype), device=device)
        dora = DoraState(tuple(None if a is None else a.magnitude for a in adapters), norm, torch.ones_like(norm))
    return GroupState(group, tuple(linears), wide, A, copies, bias, stream, trained, dora)


def _trained(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return parameter if parameter is not None and parameter.requires_grad else None


def fixed_copies(state: GroupState) -> list[tuple[Tensor, Tensor]]:
    """(to, from) of what a refresh copies, for as long as the state holds."""
    group, found = state.group, []
    for j in group.adapted:
        adapter = state.linears[j].adapter
        assert adapter is not None
        assert state.A is not None
        found.append((state.A[group.columns[j]], adapter.A.detach()))
        if state.B is not None and (copy := state.B[j]) is not None:
            found.append((copy, adapter.B.detach()))
    if state.bias is not None and not state.adds_biases:
        plain = [linear.base.bias for linear in state.linears]
        found += [(state.bias[rows], b.detach()) for rows, b in zip(group.rows, plain) if b is not None]
    return found


def add_biases(state: GroupState) -> None:
    """Biases of the adapters on top of those of the layers, where there are both or scaled ones."""
    if state.bias is not None and state.adds_biases:
        added = [None if linear.adapter is None else linear.adapter.bias for linear in state.linears]
        total = combine_bias(state.group, [linear.base.bias for linear in state.linears], added, state.bias.dtype)
        assert total is not None
        state.bias.copy_(total)
