"""The most bytes that a layer's forward, and its backward, hold at once.

Counted as in `footprint.py`, with what the layer keeps and its input: moment by moment of `models/block_forward.py`
and `models/block_backward.py`. Letters: T tokens, H hidden size, I intermediate size, e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyralis.memory.footprint import (
    attention_kept,
    kept_per_token,
    left_per_token,
    mlp_kept,
    product_kept,
    statistics,
)
from pyralis.memory.shape import LayerShape
from pyralis.models.policy import RECOMPUTING, SavePolicy, makes_product_again
from pyralis.ops.glu_lora import HOPPER, partial_bytes
from pyralis.ops.lora_tiles import reads_dy_once

DQ_SUMS = 4  # bytes of the float32 sum that attention's backward holds of each element of dq


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes, the layer's input included: of the forward with its output, of the backward with its output's gradient.

    What the layer keeps is part of both, but an input that waits in host memory is not there before and after.
    """

    forward: int
    backward: int


def peaks(layer: LayerShape, policy: SavePolicy, tokens: int, tile: int | None = None) -> Peaks:
    """tile: tokens that the MLP takes at a time, if the policy recomputes; None: all."""
    if policy not in RECOMPUTING:
        return Peaks(tokens * _kept_forward(layer, policy), _backward(layer, policy, tokens))
    if tile is None or tile >= tokens:
        forward = max(_attention_forward(layer), _stream(layer) + _mlp_forward(layer))
        return Peaks(tokens * forward, _backward(layer, policy, tokens))
    forward = tokens * (_stream(layer) + _residual(layer) + left_per_token(layer)) + tile * _mlp_forward(layer)
    return Peaks(max(tokens * _attention_forward(layer), forward), _tiled_backward(layer, tokens, tile))


def _hidden(layer: LayerShape) -> int:
    return layer.element_size * layer.spec.hidden_size


def _residual(layer: LayerShape) -> int:
    return layer.residual_size * layer.spec.hidden_size


def _is_wide(layer: LayerShape) -> bool:
    """Whether the stream is wider than what attention adds to it, whose memory the sum cannot take then."""
    return layer.residual_size != layer.element_size and layer.spec.post_attention_norm is None


def _branch(layer: LayerShape) -> int:
    """What attention adds to the stream."""
    return _hidden(layer) if _is_wide(layer) else _residual(layer)


def _stream(layer: LayerShape) -> int:
    """Input and sum, where the sum takes the branch's memory; input and branch elsewhere."""
    return _residual(layer) + _branch(layer)


def _sum_apart(layer: LayerShape) -> int:
    return _residual(layer) if _is_wide(layer) else 0


def _kept_forward(layer: LayerShape, policy: SavePolicy) -> int:
    """All that a forward computes, before the policy drops anything, and its output."""
    e = layer.element_size
    _, _, gate_up, down = layer.groups
    total = kept_per_token(layer, "keep")
    total += sum(e * (g.group.width - g.kept_width(keep=True)) for g in (layer.groups[0], gate_up))
    total += e * down.group.width - product_kept(layer)
    if policy == "recompute_cheap":  # their own, made while the inputs are there
        total += sum(e * g.kept_width(keep=False) for g in (layer.groups[0], gate_up))
    if gate_up.trains_magnitude and not gate_up.group.has_dropout:
        total += e * gate_up.rows
    return total + _output(layer)


def _output(layer: LayerShape) -> int:
    """And the branch that is added to make it, where the product does not add it."""
    if layer.spec.post_mlp_norm is not None:
        return 2 * _residual(layer)
    apart = layer.residual_size != layer.element_size or layer.spec.residual_multiplier != 1
    return _residual(layer) + (_hidden(layer) if apart else 0)


def _attention_forward(layer: LayerShape) -> int:
    """Input, all of attention, and what it adds to the stream."""
    qkv = layer.groups[0]
    dropped = layer.element_size * (qkv.group.width - qkv.kept_width(keep=True))
    return _stream(layer) + attention_kept(layer, keep=True) + dropped


def _mlp_forward(layer: LayerShape) -> int:
    """Beside `_stream`, where all is given up that nothing reads again."""
    spec, e = layer.spec, layer.element_size
    _, _, gate_up, down = layer.groups
    made = e * gate_up.group.width + e * gate_up.rows + (e * gate_up.group.out_features if gate_up.group.dora else 0)
    product, columns = e * down.group.width, e * down.kept_width(keep=False)
    most = max(made, e * gate_up.rows + product, product - columns + left_per_token(layer) + _output(layer))
    return _sum_apart(layer) + statistics(spec.pre_mlp_norm.kind) + most


def _backward(layer: LayerShape, policy: SavePolicy, tokens: int) -> int:
    again = policy in RECOMPUTING
    held: SavePolicy = "recompute_cheap" if again else policy
    keep = policy == "keep"
    dy, kept = _residual(layer), kept_per_token(layer, held)
    in_mlp = tokens * (dy + kept) + _mlp_backward(layer, policy, tokens)
    in_attention = _stream_kept(layer) + attention_kept(layer, keep=keep) + dy + _attention_backward(layer, keep)
    made_again = dy + _attention_forward(layer) + left_per_token(layer) if again else 0
    return max(in_mlp, tokens * in_attention, tokens * made_again)


def _stream_kept(layer: LayerShape) -> int:
    """The layer's input and the stream before the MLP, whose gradient takes its memory."""
    return 2 * _residual(layer)


def _mlp_backward(layer: LayerShape, policy: SavePolicy, tokens: int) -> int:
    """The most beside dy and what is held: while gate and up are made again, in the gradient of act(gate) * up, or in
    the kernel over it."""
    spec, e = layer.spec, layer.element_size
    _, _, gate_up, down = layer.groups
    again, hidden = policy in RECOMPUTING, _hidden(layer)
    input_again = e * (gate_up.group.width - gate_up.kept_width(keep=False)) if again else 0
    scaled = e * gate_up.rows if gate_up.trains_magnitude and not gate_up.group.has_dropout else 0
    h = e * spec.intermediate_size if not _keeps_product(layer, policy) and down.group.has_dropout else 0
    normed = spec.post_mlp_norm is not None
    branch = hidden if normed else _residual(layer) if spec.residual_multiplier != 1 else 0
    copy = hidden if not normed and layer.residual_size != e else 0
    lora = e * down.group.pad
    room = e * down.rows if down.wide else lora
    dh = e * spec.intermediate_size
    releases = again and not down.trains_base  # dy's copy, in which t lies, once t has been copied
    in_product = max(branch, lora if releases else 0) + copy + room + dh
    in_kernel = tokens * (h + dh + (lora if releases else copy + room)) + glu_partials(layer, tokens)
    return tokens * scaled + max(tokens * input_again, tokens * (h + in_product), in_kernel)


def _keeps_product(layer: LayerShape, policy: SavePolicy) -> bool:
    """Whether act(gate) * up is kept."""
    down = layer.groups[3]
    return policy == "keep" and down.reads_input and not makes_product_again(down.group, down.trains_base)


def glu_partials(layer: LayerShape, tokens: int) -> int:
    """Float32 partial sums of the kernel that yields the gradients of gate, up and LoRA around them; 0 where it does
    not run (`models/block_glu.py`)."""
    _, _, gate_up, down = layer.groups
    if layer.element_size != 2 or layer.gpu.capability < (8, 0):
        return 0
    group = gate_up.group
    lora = gate_up.trains_B and not (group.dora or group.has_dropout)
    into = down.trains_A and not (down.trains_base or down.group.has_dropout)
    ranks = ({group.runs[0].like.rank} if lora else set()) | ({down.group.rank} if into else set())
    if len(ranks) != 1 or (lora and len(group.runs) != 1) or not (into or not down.reads_input):
        return 0
    (rank,) = ranks
    if not reads_dy_once(rank) or (rank > 16 and layer.gpu.capability != HOPPER):
        return 0
    size, activation = layer.spec.intermediate_size, layer.spec.activation
    return partial_bytes(tokens, size, rank, layer.gpu, activation, lora=group if lora else None, down=into)


def _attention_backward(layer: LayerShape, keep: bool) -> int:
    """Beside dy, input, stream and what attention kept: the gradients of heads, q, k and v, the float32 sums that
    kernels keep of dq, and q and k where norms let them be dropped."""
    spec, e = layer.spec, layer.element_size
    again = e * sum(spec.qkv_features[:2]) if spec.q_norm is not None and not keep else 0
    return again + e * (spec.query_features + sum(spec.qkv_features)) + DQ_SUMS * spec.query_features


def _tiled_backward(layer: LayerShape, tokens: int, tile: int) -> int:
    """Of attention all is there. The gradient of the residual stream takes the branch's memory where dtypes allow."""
    dy, attention = _residual(layer), attention_kept(layer, keep=False)
    gradient = _sum_apart(layer)
    whole = tokens * (_stream(layer) + attention + left_per_token(layer) + gradient + dy)
    in_mlp = whole + tile * (_sum_apart(layer) + mlp_kept(layer, keep=False))
    in_mlp += _mlp_backward(layer, "recompute_layer", tile) + layer.tile_sums
    in_attention = _stream_kept(layer) + attention + dy + _attention_backward(layer, keep=False)
    again = dy + _attention_forward(layer) + left_per_token(layer)
    return max(in_mlp, tokens * in_attention, tokens * again)
