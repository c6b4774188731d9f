"""The MLP of the fused block, forward and backward, of any rows of the residual stream.

Shapes as in `block_forward.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.models.block_glu import drops, gate_and_up, product_backward, product_forward
from pyralis.models.block_linear import linear, linear_backward, linear_with_room, project, scaled_again, wide_rows
from pyralis.models.block_parts import Activations, Context, norm_backward, norm_forward, normed_again
from pyralis.models.gradients import FlatGradients
from pyralis.models.group_state import GroupState
from pyralis.ops.glu import glu_forward


def to_product(c: Context, a: Activations, branch: Tensor) -> None:
    """All before the down projection into `a`, or what `mlp_output` reads of it. branch: as in `to_gate_up`."""
    to_gate_up(c, a, branch)
    assert a.gate_up is not None
    if c.spends:
        a.y2 = a.xa3 = a.u3 = None
    a.product, a.xa4 = product_forward(c, a.gate_up)
    if c.spends:
        a.gate_up = None


def to_gate_up(c: Context, a: Activations, branch: Tensor) -> None:
    """branch: what attention adds to a.x; the sum may take its memory."""
    spec, state = c.spec, c.state
    a.y2 = wide_rows(state.gate_up, branch.shape[0], state.dtype, branch.device)
    a.h, a.stats2 = norm_forward(spec.pre_mlp_norm, state, branch, a.y2, residual=a.x)
    a.xa3 = project(state.gate_up, a.y2, c.rng)
    a.gate_up, a.u3 = linear_with_room(state.gate_up, a.y2, c.matrices[2], c.rng)


def to_gate_up_again(c: Context, a: Activations, branch: Tensor, left: Activations) -> None:
    """What the backward reads of the MLP into `a`. left: what the forward has left of it."""
    group = c.state.gate_up
    to_gate_up(c, a, branch)
    a.y2, a.xa3 = kept_input(group, a.y2, a.xa3, keep=False)
    if not group.trained.reads_product:
        a.u3 = None
    a.xa4, a.u4, a.d, a.d_stats = left.xa4, left.u4, left.d, left.d_stats
    left.xa4 = left.u4 = left.d = None


def kept_input(
    group: GroupState, x_wide: Tensor | None, xa: Tensor | None, *, keep: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(the input, its LoRA columns) if the backward is to have them; the columns alone in memory of their own."""
    keep = keep and group.trained.reads_input
    if xa is None or not any(b is not None for b in group.trained.B):
        return x_wide if keep else None, None
    return (x_wide, xa) if keep else (None, xa.contiguous())


def mlp_output(c: Context, a: Activations) -> Tensor:
    """The layer's output [T, H] of what `to_product` left."""
    spec, down, matrix = c.spec, c.state.down, c.matrices[3]
    assert a.h is not None
    assert a.product is not None
    plain = spec.post_mlp_norm is None and spec.residual_multiplier == 1
    if plain and a.h.dtype == matrix.dtype:
        y, a.u4 = linear(down, a.product, matrix, c.rng, residual=a.h)
        return y
    branch, a.u4 = linear(down, a.product, matrix, c.rng)
    if spec.post_mlp_norm is not None:
        a.d, branch = branch, torch.empty_like(branch, dtype=a.h.dtype)
        _, a.d_stats = norm_forward(spec.post_mlp_norm, c.state, a.d, branch)
    return torch.add(a.h, branch, alpha=spec.residual_multiplier)


def mlp_backward(c: Context, a: Activations, flat: FlatGradients, dy: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of the residual stream before the MLP, [T, H]. out: by default that stream's own memory."""
    spec, state = c.spec, c.state
    if a.gate_up is None:
        assert a.u3 is not None
        a.gate_up = scaled_again(state.gate_up, a.u3)
    branch = dy if spec.residual_multiplier == 1 else dy * spec.residual_multiplier
    if spec.post_mlp_norm is not None:
        assert a.d is not None
        branch = norm_backward(spec.post_mlp_norm, state, flat, branch, a.d, a.d_stats)
    if a.product is None and state.down.trained.reads_input and drops(c, state.down):
        a.product = glu_forward(*gate_and_up(c, a.gate_up), spec.activation)
    down = linear_backward(state.down, flat, branch.to(state.dtype), c.matrices[3], a.xa4, c.rng, a.product, a.u4)
    del branch
    if c.spends:
        down.release_dy()
    room = product_backward(c, a, flat, down)  # a.gate_up holds its gradient from here on
    del down
    if a.y2 is None and state.gate_up.trained.reads_input:
        a.y2 = normed_again(spec.pre_mlp_norm, c, a.h)
    dy2 = linear_backward(state.gate_up, flat, a.gate_up, c.matrices[2], a.xa3, c.rng, a.y2, a.u3, room).finish(a.y2)
    del room
    h, a.h = a.h, None
    a.gate_up = a.y2 = a.product = a.xa3 = a.xa4 = a.u3 = a.u4 = a.d = None  # xa3 and xa4: columns of y2 and product
    assert h is not None
    out = h if out is None else out
    return norm_backward(spec.pre_mlp_norm, state, flat, dy2, h, a.stats2, residual_grad=dy, out=out)
