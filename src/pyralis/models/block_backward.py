"""The fused block's backward: the gradient of its input; all others go to their place on the way (`gradients.py`).

It works in place over what the forward left, so it runs once. Shapes as in `block_forward.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyralis.models.block_forward import forward_to_product, normed_again, rotated
from pyralis.models.block_glu import drops, gate_and_up, product_backward
from pyralis.models.block_linear import linear_backward, scaled_again, wide_gradient
from pyralis.models.block_parts import Activations, Context, norm_backward
from pyralis.models.gradients import FlatGradients
from pyralis.models.policy import SavePolicy
from pyralis.ops.attention import AttentionLayout, attention_backward
from pyralis.ops.glu import glu_forward
from pyralis.ops.rope import rope_backward


def block_backward(
    c: Context, a: Activations, x: Tensor, layout: AttentionLayout, flat: FlatGradients, dy: Tensor, policy: SavePolicy
) -> Tensor:
    """dx [T, H] of dy [T, H]; `a` is what `kept` left, x the layer's input."""
    if policy in ("recompute_layer", "offload_input"):
        a = replace(forward_to_product(c, x, layout), d=a.d, d_stats=a.d_stats, u4=a.u4)
    else:
        a.x = x
    dh = _mlp_backward(c, a, flat, dy)
    return _attention_backward(c, a, flat, dh)


def _mlp_backward(c: Context, a: Activations, flat: FlatGradients, dy: Tensor) -> Tensor:
    """The gradient of the residual stream before the MLP, [T, H]."""
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
    room = product_backward(c, a, flat, down)  # a.gate_up holds its gradient from here on
    del down
    if a.y2 is None and state.gate_up.trained.reads_input:
        a.y2 = normed_again(spec.pre_mlp_norm, c, a.h)
    dy2 = linear_backward(state.gate_up, flat, a.gate_up, c.matrices[2], a.xa3, c.rng, a.y2, a.u3, room).finish(a.y2)
    del room
    a.gate_up = a.y2 = a.product = a.xa3 = a.xa4 = a.u3 = a.u4 = None  # xa3 and xa4 are columns of y2 and product
    assert a.h is not None
    return norm_backward(spec.pre_mlp_norm, state, flat, dy2, a.h, a.stats2, residual_grad=dy)


def _attention_backward(c: Context, a: Activations, flat: FlatGradients, dh: Tensor) -> Tensor:
    """The gradient of the layer's input, [T, H], in dh's memory."""
    spec, state = c.spec, c.state
    branch = dh if spec.residual_multiplier == 1 else dh * spec.residual_multiplier
    if spec.post_attention_norm is not None:
        assert a.o is not None
        branch = norm_backward(spec.post_attention_norm, state, flat, branch, a.o, a.o_stats)
    group = state.attention_out
    out = linear_backward(group, flat, branch.to(state.dtype), c.matrices[1], a.xa2, c.rng, a.heads, a.u2)
    dheads = out.finish(a.heads)
    del out
    assert a.x is not None
    dqkv = _qkv_backward(c, a, flat, dheads)
    if a.y1 is None and state.qkv.trained.reads_input:
        a.y1 = normed_again(spec.input_norm, c, a.x)
    dy1 = linear_backward(state.qkv, flat, dqkv, c.matrices[0], a.xa1, c.rng, a.y1, a.u1).finish(a.y1)
    return norm_backward(spec.input_norm, state, flat, dy1, a.x, a.stats1, residual_grad=dh, out=dh)


def _qkv_backward(c: Context, a: Activations, flat: FlatGradients, dheads: Tensor) -> Tensor:
    """The gradient of the q, k and v projections' output, that of `wide_gradient`."""
    spec, norm = c.spec, c.qk_norm()
    assert a.qkv is not None
    assert a.attention is not None
    attention = a.attention
    if not attention.q.shape[0]:  # the policy dropped them
        q, k, _ = rotated(c, a)
        attention = replace(attention, q=q, k=k)
    dqkv = wide_gradient(c.state.qkv, a.qkv.shape[0], a.qkv.dtype, a.qkv.device)
    room = dqkv.shape[1] - a.qkv.shape[1]
    to_q, to_k, to_v, _ = dqkv.split_with_sizes((*spec.qkv_features, room), 1)
    dq, dk, dv = attention_backward(dheads, attention)
    to_v.copy_(dv)
    weights = () if norm is None else (norm.q_weight, norm.k_weight)
    grads = [torch.empty_like(w) if w.requires_grad else None for w in weights] or [None, None]
    shape = (dq.shape[0], -1, spec.attention.head_dim)
    rope_backward(
        dq.view(shape), dk.view(shape), c.cos, c.sin, norm=norm, saved=a.qk_saved,
        dq_weight=grads[0], dk_weight=grads[1], dq_out=to_q.view(shape), dk_out=to_k.view(shape),
    )  # fmt: skip
    for part, grad in zip((spec.q_norm, spec.k_norm), grads):
        if part is not None and grad is not None:
            flat.write(c.state.norms[part.path][0], grad)
    return dqkv
