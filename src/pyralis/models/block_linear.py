"""Groups of linear layers that share their input, as the fused block's forward and backward call them.

Shapes: T tokens, K and N a group's input and output features, P its LoRA columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.models.gradients import FlatGradients, GroupGradients
from pyralis.models.group_state import GroupState
from pyralis.ops.dora import dora_backward, dora_forward, norms_and_ratio
from pyralis.ops.feature_scale import feature_scale
from pyralis.ops.gemm import gemm
from pyralis.ops.lora import lora_backward, lora_forward, lora_project


def wide_rows(group: GroupState, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, K + P] for a group's input."""
    return torch.empty((tokens, group.group.width), dtype=dtype, device=device)


def wide_gradient(group: GroupState, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, N + P] for dy of a group whose A lies below W, so that dy need not be copied there; else [T, N]."""
    return torch.empty((tokens, group.rows), dtype=dtype, device=device)


def refresh_magnitudes(group: GroupState, matrix: Tensor) -> None:
    """Bring what DoRA multiplies by up to date with W, A, B and the magnitudes."""
    if (dora := group.dora) is not None and group.A is not None:
        magnitude = [None if m is None else m.detach() for m in dora.magnitude]
        norms_and_ratio(group.group, group.weight(matrix), group.A, magnitude, norm=dora.norm, ratio=dora.ratio)


def project(group: GroupState, x_wide: Tensor, rng: Tensor | None) -> Tensor | None:
    """Fill the LoRA columns of x_wide; returns those that the backward reads, [T, R]."""
    if group.A is None:
        return None
    return lora_project(group.group, x_wide, group.A, rng=rng, stream=group.stream)[:, : group.group.rank]


def linear(
    group: GroupState, x_wide: Tensor, matrix: Tensor, rng: Tensor | None, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(y [T, N] with bias, LoRA and residual; the product before DoRA's magnitudes)."""
    return _linear(group, x_wide, matrix, rng, residual, None)


def linear_with_room(
    group: GroupState, x_wide: Tensor, matrix: Tensor, rng: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same with y in the first columns of `wide_gradient`."""
    room = wide_gradient(group, x_wide.shape[0], matrix.dtype, x_wide.device)
    _, u = _linear(group, x_wide, matrix, rng, None, _features(group, room))
    return room, u


def scaled_again(group: GroupState, u: Tensor) -> Tensor:
    """What `linear_with_room` made of DoRA's product without dropout."""
    assert group.dora is not None
    room = wide_gradient(group, u.shape[0], u.dtype, u.device)
    feature_scale(u, group.dora.ratio, bias=group.bias, out=_features(group, room))
    return room


def _linear(
    group: GroupState, x_wide: Tensor, matrix: Tensor, rng: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    g, weight = group.group, group.weight(matrix)
    if group.dora is None:
        return lora_forward(g, x_wide, weight, bias=group.bias, residual=residual, out=out), None
    return dora_forward(
        g, x_wide, weight, group.dora.ratio, bias=group.bias, residual=residual, out=out, rng=rng, stream=group.stream
    )


def _features(group: GroupState, wide: Tensor) -> Tensor:
    """The first N columns."""
    N = group.group.out_features
    return wide if wide.shape[1] == N else wide[:, :N]


@dataclass(slots=True, eq=False)
class LoraRoom:
    """Where a group's backward puts its gradients and t. filled: t and the gradients of B are there already."""

    gradients: GroupGradients
    t: Tensor  # s dy B, [T, P]
    dy_wide: Tensor | None  # [dy | t], where one product takes both
    filled: bool = False


def lora_room(group: GroupState, flat: FlatGradients, dy: Tensor, dropout: bool) -> LoraRoom:
    """dy: [T, N], or that of `wide_gradient`, which then has t behind dy. dropout: whether it is on."""
    g, T = group.group, dy.shape[0]
    gradients = GroupGradients.of(flat, g, group.trained, dy)
    if not group.wide or dropout:
        return LoraRoom(gradients, torch.empty((T, g.pad), dtype=dy.dtype, device=dy.device), None)
    wide = dy if dy.shape[1] > g.out_features else wide_gradient(group, T, dy.dtype, dy.device)
    return LoraRoom(gradients, wide[:, g.out_features :], wide)


@dataclass(slots=True, eq=False)
class LinearBackward:
    """The backward of a linear group in two parts, for an input that is known again only after dx."""

    group: GroupState
    gradients: GroupGradients
    dy: Tensor  # [T, N], what base weights have for a gradient
    dx: Tensor  # [T, K]
    t: Tensor  # s dy B, [T, P]
    A_deferred: Tensor | None = None

    def release_dy(self) -> None:
        """Give up dy's memory, in which t lies, where only `dA` is still to be made: t is a 64th of it or so."""
        if not any(weight is not None for weight in self.group.trained.weights):
            self.dy = self.t  # dy itself first
            self.dy = self.t = self.t.clone()

    def finish(self, x: Tensor | None) -> Tensor:
        """Gradients that need x [T, K or K + P]; returns dx. What overwrites dx has to come before."""
        group = self.group.group
        if self.A_deferred is not None or any(weight is not None for weight in self.group.trained.weights):
            assert x is not None
            x = x[:, : group.in_features]
            if self.A_deferred is not None:
                gemm(self.A_deferred, self.t[:, : group.rank].t(), x, 1.0, self.gradients.add)
            self.gradients.weights(self.dy, x)
        self.gradients.finish()
        return self.dx


def linear_backward(
    group: GroupState,
    flat: FlatGradients,
    dy: Tensor,
    matrix: Tensor,
    xa: Tensor | None,
    rng: Tensor | None,
    x: Tensor | None = None,
    u: Tensor | None = None,
    room: LoraRoom | None = None,
) -> LinearBackward:
    """dx, and gradients of B, biases and magnitudes; `finish(x)` does the rest.

    dy: [T, N], or that of `wide_gradient`, which is then written to. x [T, K or K + P]: only for dropout, whose one
    pass over x yields dA and dx. u: the second of `linear`'s results. room: that of dy, if there is one.
    """
    g = group.group
    dropout = rng is not None and g.has_dropout
    room = lora_room(group, flat, dy, dropout) if room is None else room
    gradients, t, dy_wide = room.gradients, room.t, room.dy_wide
    dx = torch.empty((dy.shape[0], g.in_features), dtype=matrix.dtype, device=dy.device)
    A = dx[:0] if group.A is None else group.A
    dy = _features(group, dy)
    lora, deferred = gradients.lora, None
    if not dropout:
        lora, deferred = gradients.without_A, gradients.lora.A
    x = x[:, : g.in_features] if dropout and x is not None else dx  # not read without dropout
    xa = dy if xa is None else xa
    weight, rng = group.weight(matrix), rng if dropout else None
    if group.dora is None:
        lora_backward(
            g, dy, weight, x, xa, A, lora, dy_wide=dy_wide, t=t, dx=dx, rng=rng, stream=group.stream,
            filled=room.filled,
        )  # fmt: skip
        return LinearBackward(group, gradients, dy, dx, t, deferred)
    dora = group.dora
    dmagnitude = torch.empty_like(dora.norm) if group.trained.reads_product else None
    _, du = dora_backward(
        g, dy, u, weight, x, xa, A, dora.ratio, dora.norm, lora, dmagnitude,
        dy_wide=dy_wide, t=t, dx=dx, rng=rng, stream=group.stream,
    )  # fmt: skip
    for rows, magnitude in zip(g.rows, group.trained.magnitudes):
        if magnitude is not None and dmagnitude is not None:
            flat.write(magnitude, dmagnitude[rows])
    return LinearBackward(group, gradients, du, dx, t, deferred)
