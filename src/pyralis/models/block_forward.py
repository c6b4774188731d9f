"""The fused block's forward, and what of it a policy keeps or computes anew. The equations are in `spec.py`.

Shapes: T tokens, H hidden size, K and N a group's input and output features, P its LoRA columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyralis.models.block_glu import drops
from pyralis.models.block_linear import linear, project, refresh_magnitudes, wide_rows
from pyralis.models.block_mlp import kept_input, mlp_output, to_product
from pyralis.models.block_parts import Activations, Context, norm_forward
from pyralis.models.block_tiles import mlp_in_tiles
from pyralis.models.policy import RECOMPUTING, SavePolicy, makes_product_again
from pyralis.ops.attention import AttentionLayout, attention_forward
from pyralis.ops.rope import rope_forward


def block_forward(c: Context, x: Tensor, layout: AttentionLayout) -> tuple[Tensor, Activations]:
    """y [T, H] of x [T, H], and what was computed on the way; with a tile, no more of it than `kept` keeps."""
    for index, group in enumerate(c.state.groups):
        if group.dora is not None:
            refresh_magnitudes(group, c.matrices[index])
    a, branch = attention_forward_part(c, x, layout)
    if c.spends:
        a = Activations(x=x)
    if c.tile is not None:
        return mlp_in_tiles(c, x, branch, c.tile)
    to_product(c, a, branch)
    del branch
    return mlp_output(c, a), a


def attention_forward_part(c: Context, x: Tensor, layout: AttentionLayout) -> tuple[Activations, Tensor]:
    """(what attention leaves, what it adds to the residual stream [T, H])."""
    spec, state, T = c.spec, c.state, x.shape[0]
    a = Activations(x=x)
    a.y1 = wide_rows(state.qkv, T, state.dtype, x.device)
    _, a.stats1 = norm_forward(spec.input_norm, state, x, a.y1)
    a.xa1 = project(state.qkv, a.y1, c.rng)
    a.qkv, a.u1 = linear(state.qkv, a.y1, c.matrices[0], c.rng)
    q, k, v = rotated(c, a)
    group = state.attention_out
    out = None if not group.group.pad else wide_rows(group, T, state.dtype, x.device)
    place = None if out is None else out[:, : group.group.in_features]
    result, a.attention = attention_forward(q, k, v, spec.attention, layout, out=place)
    a.heads = result if out is None else out
    a.xa2 = project(group, a.heads, c.rng)
    branch, a.u2 = linear(group, a.heads, c.matrices[1], c.rng)
    if spec.post_attention_norm is not None:
        a.o, branch = branch, torch.empty_like(branch, dtype=x.dtype)
        _, a.o_stats = norm_forward(spec.post_attention_norm, state, a.o, branch)
    if spec.residual_multiplier != 1:
        branch.mul_(spec.residual_multiplier)
    return a, branch


def rotated(c: Context, a: Activations) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v for attention, [T, heads * head_dim]: in place in a.qkv, or beside it where norms read it again."""
    assert a.qkv is not None
    attention, widths, norm = c.spec.attention, c.spec.qkv_features, c.qk_norm()
    q, k, v = a.qkv.split_with_sizes(widths, 1)
    new_q, new_k = q, k
    if norm is not None:
        both = torch.empty((q.shape[0], widths[0] + widths[1]), dtype=q.dtype, device=q.device)
        new_q, new_k = both.split_with_sizes(widths[:2], 1)
    shape = (q.shape[0], -1, attention.head_dim)
    q, k = q.view(shape), k.view(shape)
    outputs = (q, k) if norm is None else (new_q.view(shape), new_k.view(shape))
    _, _, a.qk_saved = rope_forward(q, k, c.cos, c.sin, norm=norm, q_out=outputs[0], k_out=outputs[1])
    return new_q, new_k, v


def kept(a: Activations, c: Context, policy: SavePolicy) -> Activations:
    """What the policy lets the backward have. The input is not among it: autograd or a store keeps that."""
    state = c.state
    if not state.down.trained.reads_product:
        a.u4 = None
    keep, down = policy == "keep", state.down
    again = makes_product_again(down.group, any(weight is not None for weight in down.trained.weights))
    product, xa4 = kept_input(down, a.product, a.xa4, keep=keep and not again)
    if policy in RECOMPUTING:
        return Activations(d=a.d, d_stats=a.d_stats, xa4=xa4, u4=a.u4)
    y1, xa1 = kept_input(state.qkv, a.y1, a.xa1, keep=keep)
    y2, xa3 = kept_input(state.gate_up, a.y2, a.xa3, keep=keep)
    a.u1, a.u2, a.u3 = (
        u if group.trained.reads_product else None for u, group in zip((a.u1, a.u2, a.u3), state.groups)
    )
    if a.u3 is not None and not drops(c, state.gate_up):
        a.gate_up = None  # made again of the product
    attention = a.attention
    assert attention is not None
    if a.qk_saved is not None and not keep:
        nothing = attention.q[:0]
        attention = replace(attention, q=nothing.clone(), k=nothing.clone())
    a.x, a.y1, a.xa1, a.y2, a.xa3, a.product, a.xa4 = None, y1, xa1, y2, xa3, product, xa4
    a.attention = attention
    return a
