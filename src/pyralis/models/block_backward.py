"""The fused block's backward: the gradient of its input; all others go to their place on the way (`gradients.py`).

It works in place over what the forward left, so it runs once. Shapes as in `block_forward.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyralis.models.block_forward import attention_forward_part, kept, rotated
from pyralis.models.block_linear import linear_backward, wide_gradient
from pyralis.models.block_mlp import mlp_backward, to_gate_up_again
from pyralis.models.block_parts import Activations, Context, norm_backward, normed_again
from pyralis.models.block_tiles import mlp_backward_in_tiles
from pyralis.models.gradients import FlatGradients
from pyralis.models.policy import RECOMPUTING, SavePolicy
from pyralis.ops.attention import AttentionLayout, attention_backward
from pyralis.ops.attention_parts import Saved as SavedAttention
from pyralis.ops.rope import rope_backward


def block_backward(
    c: Context, a: Activations, x: Tensor, layout: AttentionLayout, flat: FlatGradients, dy: Tensor, policy: SavePolicy
) -> Tensor:
    """dx [T, H] of dy [T, H]; `a` is what `kept` left, x the layer's input."""
    left, branch = a, None
    if policy in RECOMPUTING:
        a, branch = attention_forward_part(c, x, layout)
        a = kept(a, c, "recompute_cheap")
    a.x = x
    if branch is not None and c.tile is not None:
        dh = mlp_backward_in_tiles(c, left, x, branch, flat, dy, c.tile)
    else:
        if branch is not None:
            to_gate_up_again(c, a, branch, left)
            branch = None
        dh = mlp_backward(c, a, flat, dy)
    del branch
    return _attention_backward(c, a, flat, dh)


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
    del out, branch
    a.o = a.xa2 = a.u2 = None
    dq, dk, dv = attention_backward(dheads, _attention(c, a))
    del dheads
    a.attention = a.heads = None
    dqkv = _qkv_backward(c, a, flat, dq, dk, dv)
    del dq, dk, dv
    a.qkv = a.qk_saved = None
    assert a.x is not None
    if a.y1 is None and state.qkv.trained.reads_input:
        a.y1 = normed_again(spec.input_norm, c, a.x)
    dy1 = linear_backward(state.qkv, flat, dqkv, c.matrices[0], a.xa1, c.rng, a.y1, a.u1).finish(a.y1)
    return norm_backward(spec.input_norm, state, flat, dy1, a.x, a.stats1, residual_grad=dh, out=dh)


def _attention(c: Context, a: Activations) -> SavedAttention:
    """What attention's backward reads."""
    assert a.attention is not None
    if a.attention.q.shape[0]:
        return a.attention
    q, k, _ = rotated(c, a)  # the policy dropped them
    return replace(a.attention, q=q, k=k)


def _qkv_backward(c: Context, a: Activations, flat: FlatGradients, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """The gradient of the q, k and v projections' output, that of `wide_gradient`; dq, dk, dv: of their rotated ones,
    [T, heads * head_dim]."""
    spec, norm = c.spec, c.qk_norm()
    assert a.qkv is not None
    dqkv = wide_gradient(c.state.qkv, a.qkv.shape[0], a.qkv.dtype, a.qkv.device)
    room = dqkv.shape[1] - a.qkv.shape[1]
    to_q, to_k, to_v, _ = dqkv.split_with_sizes((*spec.qkv_features, room), 1)
    weights = () if norm is None else (norm.q_weight, norm.k_weight)
    grads = [torch.empty_like(w) if w.requires_grad else None for w in weights] or [None, None]
    shape = (dq.shape[0], -1, spec.attention.head_dim)
    rope_backward(
        dq.view(shape), dk.view(shape), c.cos, c.sin, norm=norm, saved=a.qk_saved,
        dq_weight=grads[0], dk_weight=grads[1], dq_out=to_q.view(shape), dk_out=to_k.view(shape),
        dv=dv.view(shape), dv_out=to_v.view(shape),
    )  # fmt: skip
    for part, grad in zip((spec.q_norm, spec.k_norm), grads):
        if part is not None and grad is not None:
            flat.write(c.state.norms[part.path][0], grad)
    return dqkv
