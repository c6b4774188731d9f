"""Norms and linear groups as the fused block's forward and backward call them, and what is saved between the two.

Shapes: T tokens, H hidden size, K and N a group's input and output features, P its LoRA columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.models.gradients import FlatGradients, GroupGradients
from pyralis.models.group_state import GroupState
from pyralis.models.spec import LayerSpec, NormSpec
from pyralis.models.weights import LayerState
from pyralis.ops.attention_parts import Saved as SavedAttention
from pyralis.ops.gemm import gemm
from pyralis.ops.layer_norm import layer_norm_backward, layer_norm_forward
from pyralis.ops.lora import lora_backward, lora_forward, lora_project
from pyralis.ops.rms_norm import rms_norm_backward, rms_norm_forward
from pyralis.ops.rope import QKNorm, QKNormSaved

Stats = tuple[Tensor, ...]  # of each row: (rstd,) of an RMS norm, (mean, rstd) of a layer norm


@dataclass(slots=True, eq=False)
class Activations:
    """What one forward leaves behind, [T, ...] each. None: not there, or dropped by the policy."""

    x: Tensor | None = None  # the layer's input
    stats1: Stats = ()
    y1: Tensor | None = None  # input_norm's output with LoRA's columns, [T, K + P]
    xa1: Tensor | None = None  # those columns alone
    qkv: Tensor | None = None  # before q/k norms and RoPE with such norms; else rotated
    qk_saved: QKNormSaved | None = None
    attention: SavedAttention | None = None
    heads: Tensor | None = None  # attention's output with LoRA's columns
    xa2: Tensor | None = None
    o: Tensor | None = None  # attention_out's output, where a norm reads it
    o_stats: Stats = ()
    h: Tensor | None = None  # the residual stream between attention and MLP
    stats2: Stats = ()
    y2: Tensor | None = None
    xa3: Tensor | None = None
    gate_up: Tensor | None = None  # with room for t = s dy B behind, as its gradient takes its place
    product: Tensor | None = None  # act(gate) * up with LoRA's columns
    xa4: Tensor | None = None
    d: Tensor | None = None  # down's output, where a norm reads it
    d_stats: Stats = ()


@dataclass(slots=True, eq=False)
class Context:
    """What does not change between a forward and its backward, but for `matrices`, which are asked for anew."""

    spec: LayerSpec
    state: LayerState
    cos: Tensor
    sin: Tensor
    rng: Tensor | None
    matrices: tuple[Tensor, ...] = ()

    def qk_norm(self) -> QKNorm | None:
        q, k = self.spec.q_norm, self.spec.k_norm
        if q is None or k is None:
            return None
        return QKNorm(self.state.norms[q.path][0], self.state.norms[k.path][0], q.eps, q.unit_offset)


def wide_rows(group: GroupState, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, K + P] for a group's input."""
    return torch.empty((tokens, group.group.width), dtype=dtype, device=device)


def norm_forward(
    spec: NormSpec, state: LayerState, x: Tensor, out: Tensor, *, residual: Tensor | None = None
) -> tuple[Tensor, Stats]:
    """Writes norm(x + residual) into `out`; returns (x + residual, statistics). The sum may take x's memory."""
    weight, bias = state.norms[spec.path]
    h_out = x if residual is not None and residual.dtype == x.dtype else None
    if spec.kind == "layer":
        made = layer_norm_forward(x, weight, bias, spec.eps, residual=residual, out=out, h_out=h_out)
        return made.h, (made.mean, made.rstd)
    rms = rms_norm_forward(x, weight, spec.eps, residual=residual, unit_offset=spec.unit_offset, out=out, h_out=h_out)
    return rms.h, (rms.rstd,)


def norm_backward(
    spec: NormSpec,
    state: LayerState,
    flat: FlatGradients,
    dy: Tensor,
    h: Tensor,
    stats: Stats,
    *,
    residual_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dh [T, H] in h's dtype, with residual_grad added; the norm's own gradients are written where it is trained."""
    weight, bias = state.norms[spec.path]
    dweight = torch.empty_like(weight) if weight.requires_grad else None
    if spec.kind == "layer":
        dbias = torch.empty_like(bias) if bias is not None and bias.requires_grad else None
        mean, rstd = stats
        dh = layer_norm_backward(
            dy, h, weight, mean, rstd, residual_grad=residual_grad, out=out, dweight=dweight, dbias=dbias
        )  # fmt: skip
        if bias is not None and dbias is not None:
            flat.write(bias, dbias)
    else:
        dh = rms_norm_backward(
            dy, h, weight, stats[0], unit_offset=spec.unit_offset, residual_grad=residual_grad, out=out, dweight=dweight
        )  # fmt: skip
    if dweight is not None:
        flat.write(weight, dweight)
    return dh


def project(group: GroupState, x_wide: Tensor, rng: Tensor | None) -> Tensor | None:
    """Fill the LoRA columns of x_wide; returns those that the backward reads, [T, R]."""
    if group.A is None:
        return None
    return lora_project(group.group, x_wide, group.A, rng=rng, stream=group.stream)[:, : group.group.rank]


def linear(group: GroupState, x_wide: Tensor, matrix: Tensor, *, residual: Tensor | None = None) -> Tensor:
    """y [T, N] with bias, LoRA and residual."""
    return lora_forward(group.group, x_wide, group.weight(matrix), bias=group.bias, residual=residual)


def linear_with_room(group: GroupState, x_wide: Tensor, matrix: Tensor) -> Tensor:
    """y in the first columns of `wide_gradient`."""
    y = wide_gradient(group, x_wide.shape[0], matrix.dtype, x_wide.device)
    N = group.group.out_features
    lora_forward(
        group.group, x_wide, group.weight(matrix), bias=group.bias, out=y if y.shape[1] == N else y[:, :N]
    )  # fmt: skip
    return y


def wide_gradient(group: GroupState, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, N + P] for dy of a group whose A lies below W, so that dy need not be copied there; else [T, N]."""
    return torch.empty((tokens, group.rows), dtype=dtype, device=device)


@dataclass(slots=True, eq=False)
class LinearBackward:
    """The backward of a linear group in two parts, for an input that is known again only after dx."""

    group: GroupState
    gradients: GroupGradients
    dy: Tensor  # [T, N]
    dx: Tensor  # [T, K]
    t: Tensor  # s dy B, [T, P]
    A_deferred: Tensor | None = None

    def finish(self, x: Tensor | None) -> Tensor:
        """Gradients that need x [T, K or K + P]; returns dx. What overwrites dx has to come before."""
        group = self.group.group
        if self.group.trained.reads_input:
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
) -> LinearBackward:
    """dx, and gradients of B and biases; `finish(x)` does the rest.

    dy: [T, N], or that of `wide_gradient`. x [T, K or K + P]: only for dropout, whose one pass over x yields dA and dx.
    """
    g, T, dtype, device = group.group, dy.shape[0], matrix.dtype, dy.device
    gradients = GroupGradients.of(flat, g, group.trained, dy)
    dx = torch.empty((T, g.in_features), dtype=dtype, device=device)
    A = dx[:0] if group.A is None else group.A
    dropout = rng is not None and g.has_dropout
    dy_wide = None
    if group.wide and not dropout:
        dy_wide = dy if dy.shape[1] > g.out_features else wide_gradient(group, T, dtype, device)
        t = dy_wide[:, g.out_features :]
    else:
        t = torch.empty((T, g.pad), dtype=dtype, device=device)
    if dy.shape[1] > g.out_features:
        dy = dy[:, : g.out_features]
    lora, deferred = gradients.lora, None
    if not dropout:
        lora, deferred = gradients.without_A, gradients.lora.A
    x = x[:, : g.in_features] if dropout and x is not None else dx  # not read without dropout
    lora_backward(
        g, dy, group.weight(matrix), x, dy if xa is None else xa, A, lora,
        dy_wide=dy_wide, t=t, dx=dx, rng=rng if dropout else None, stream=group.stream,
    )  # fmt: skip
    return LinearBackward(group, gradients, dy, dx, t, deferred)
