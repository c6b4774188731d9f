"""What the fused block's forward and backward share: what is saved between the two, and norms as they call them.

Shapes: T tokens, H hidden size, K and N a group's input and output features, P its LoRA columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.models.gradients import FlatGradients
from pyralis.models.spec import LayerSpec, NormSpec
from pyralis.models.weights import LayerState
from pyralis.ops.attention_parts import Saved as SavedAttention
from pyralis.ops.layer_norm import layer_norm_backward, layer_norm_forward
from pyralis.ops.rms_norm import rms_norm_backward, rms_norm_forward
from pyralis.ops.rope import QKNorm, QKNormSaved

Stats = tuple[Tensor, ...]  # of each row: (rstd,) of an RMS norm, (mean, rstd) of a layer norm


@dataclass(slots=True, eq=False)
class Activations:
    """What one forward leaves behind, [T, ...] each. None: not there, or dropped by the policy.

    u1 to u4: of groups with DoRA, their products before the magnitudes.
    """

    x: Tensor | None = None  # the layer's input
    stats1: Stats = ()
    y1: Tensor | None = None  # input_norm's output with LoRA's columns, [T, K + P]
    xa1: Tensor | None = None  # those columns alone
    u1: Tensor | None = None
    qkv: Tensor | None = None  # before q/k norms and RoPE with such norms; else rotated
    qk_saved: QKNormSaved | None = None
    attention: SavedAttention | None = None
    heads: Tensor | None = None  # attention's output with LoRA's columns
    xa2: Tensor | None = None
    u2: Tensor | None = None
    o: Tensor | None = None  # attention_out's output, where a norm reads it
    o_stats: Stats = ()
    h: Tensor | None = None  # the residual stream between attention and MLP
    stats2: Stats = ()
    y2: Tensor | None = None
    xa3: Tensor | None = None
    u3: Tensor | None = None
    gate_up: Tensor | None = None  # with room for t = s dy B behind, as its gradient takes its place
    product: Tensor | None = None  # act(gate) * up with LoRA's columns
    xa4: Tensor | None = None
    u4: Tensor | None = None
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
    matrices: Sequence[Tensor] = ()  # made when asked for; each valid until another one is
    tile: int | None = None  # tokens that the MLP takes at a time; None: all
    spends: bool = False  # whether what a forward computes is given up on the way, since its backward computes it anew

    def qk_norm(self) -> QKNorm | None:
        q, k = self.spec.q_norm, self.spec.k_norm
        if q is None or k is None:
            return None
        return QKNorm(self.state.norms[q.path][0], self.state.norms[k.path][0], q.eps, q.unit_offset)


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
    dweight = torch.empty_like(weight, dtype=flat.dtype(weight)) if weight.requires_grad else None
    if spec.kind == "layer":
        dbias = torch.empty_like(bias, dtype=flat.dtype(bias)) if bias is not None and bias.requires_grad else None
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


def normed_again(spec: NormSpec, c: Context, x: Tensor | None) -> Tensor:
    """A norm's output [T, H] computed anew, without room for LoRA."""
    assert x is not None
    out = torch.empty(x.shape, dtype=c.state.dtype, device=x.device)
    norm_forward(spec, c.state, x, out)
    return out
