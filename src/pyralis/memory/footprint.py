"""Bytes: what a layer keeps between its forward and its backward, and what a step holds besides.

Counted from what the code keeps (`models/block_forward.py`), tensor by tensor; the allocator's rounding to 512 bytes is
left out. What it holds at its peaks is in `peaks.py`. Letters as there: T tokens, H hidden size, e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyralis.memory.shape import LayerShape, ModelShape
from pyralis.models.policy import SavePolicy, makes_product_again
from pyralis.ops._head import GPU_CHUNK_BYTES

MIB = 2**20
# cuBLAS' and cuDNN's workspaces, bitsandbytes' tables, RoPE's angles, batches.
LIBRARIES = 96 * MIB
# Outside the allocator: the CUDA context with this process's kernels. Seen on an H100, torch 2.11.
CONTEXT = 560 * MIB
# Reserved by the allocator and not in use at the peak: holes between blocks. 1 % in the H100's runs without graphs.
HOLES = 0.02
GRADIENT_SIZE = 4  # of an adapter's parameter


def kept_per_token(layer: LayerShape, policy: SavePolicy) -> int:
    """Device bytes that a layer keeps for each token, its input included."""
    residual, left = layer.spec.hidden_size * layer.residual_size, left_per_token(layer)
    if policy == "offload_input":
        return left
    if policy == "recompute_layer":
        return residual + left
    keep = policy == "keep"
    return 2 * residual + attention_kept(layer, keep=keep) + mlp_kept(layer, keep=keep) + left


def attention_kept(layer: LayerShape, *, keep: bool) -> int:
    """Of attention, its norm included, beside the layer's input. keep: of "keep", not of "recompute_cheap"."""
    spec, e = layer.spec, layer.element_size
    qkv, out, _, _ = layer.groups
    heads, kv_heads, hidden = spec.attention.num_heads, spec.attention.num_kv_heads, spec.hidden_size * e
    total = statistics(spec.input_norm.kind)
    total += e * qkv.kept_width(keep=keep) + e * qkv.group.out_features * (2 if qkv.trains_magnitude else 1)
    total += e * out.group.width + 4 * heads + _apart(layer)
    if spec.q_norm is not None:
        total += 4 * (heads + kv_heads)
        total += e * sum(spec.qkv_features[:2]) if keep else 0
    if spec.post_attention_norm is not None:
        total += hidden + statistics(spec.post_attention_norm.kind)
    return total + (hidden if out.trains_magnitude else 0)


def mlp_kept(layer: LayerShape, *, keep: bool) -> int:
    """Of the MLP, its norm included, beside the stream before it and what `left_per_token` counts."""
    spec, e = layer.spec, layer.element_size
    _, _, gate_up, down = layer.groups
    total = statistics(spec.pre_mlp_norm.kind) + e * gate_up.kept_width(keep=keep)
    if gate_up.trains_magnitude:  # the product without DoRA's magnitudes, of which the one with them is made again
        total += e * gate_up.group.out_features
    if not gate_up.trains_magnitude or gate_up.group.has_dropout:
        total += e * gate_up.rows
    return total + (product_kept(layer) - e * down.kept_width(keep=False) if keep else 0)


def product_kept(layer: LayerShape) -> int:
    """Of act(gate) * up and its LoRA columns, under "keep"."""
    down = layer.groups[3]
    return layer.element_size * down.kept_width(keep=not makes_product_again(down.group, down.trains_base))


def left_per_token(layer: LayerShape) -> int:
    """Of the down projection under every policy: its LoRA columns, and its output where something reads it."""
    spec, e, down = layer.spec, layer.element_size, layer.groups[3]
    hidden = spec.hidden_size * e
    total = e * down.kept_width(keep=False) + (hidden if down.trains_magnitude else 0)
    return total + (hidden + statistics(spec.post_mlp_norm.kind) if spec.post_mlp_norm is not None else 0)


def statistics(kind: str) -> int:
    """Of a row of a norm."""
    return 8 if kind == "layer" else 4


def _apart(layer: LayerShape) -> int:
    """The output that attention by autograd (softcaps) keeps beside the copy with LoRA's columns."""
    copied = layer.groups[1].group.pad > 0
    return layer.element_size * layer.spec.query_features if layer.spec.attention.softcap is not None and copied else 0


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """Of the loss. forward: at its peak, the last layer's output included; kept: until the backward's first layer."""

    forward: int
    backward: int


def head_bytes(model: ModelShape, tokens: int, supervised: int, chunk_bytes: int | None) -> HeadBytes:
    """supervised: rows that reach the head. A final norm that is stock's keeps a float32 copy, and its backward makes
    four more; the fused one reads its input, and writes beside it."""
    hidden, e, stream = model.hidden_size, model.head_size, model.layers[-1].residual_size
    rows = min(supervised, tokens)
    stride = -(-model.vocabulary // 64) * 64
    chunk = GPU_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    weight = model.vocabulary * hidden
    if model.head_trained and chunk_bytes is None:
        chunk = max(chunk, weight * e)
    logits = min(rows * stride * e, max(chunk, stride * e))
    if model.fused_norm:
        cast = 0 if stream == e else e
        norm, norm_backward = tokens * (hidden * (2 * stream + cast) + statistics("rms")), tokens * hidden * 3 * stream
    else:  # float32, normalised, and the output
        norm, norm_backward = tokens * hidden * (4 + 2 * e), tokens * hidden * (5 * 4 + 2 * e)
    gradient = rows * hidden * e  # where rows are left out, in place of those that are not
    trained = weight * 4 if model.head_trained else 0
    forward = norm + logits + gradient + trained
    return HeadBytes(forward, norm_backward + trained)


@dataclass(frozen=True, slots=True)
class Standing:
    """Bytes that are there whatever the batch: by what they are of."""

    weights: int
    adapters: int  # parameters of LoRA, and compute copies
    gradients: int
    optimizer: int
    matrices: int  # the workspace, and those that are kept
    libraries: int = LIBRARIES

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.matrices + self.libraries


def standing_bytes(model: ModelShape, resident: tuple[bool, ...], moments: float, *, in_turn: bool = False) -> Standing:
    """resident: of each layer, whether its matrices are kept; in_turn: whether the others' are made one after another.
    moments: bytes of the optimizer per trained parameter."""
    made = [layer for layer, kept in zip(model.layers, resident) if not kept]
    shared = [layer.largest_matrix if in_turn else layer.matrices for layer in made]
    own = [layer.matrices for layer, kept in zip(model.layers, resident) if kept]
    copies = sum(group.copied * layer.element_size for layer in model.layers for group in layer.groups)
    return Standing(
        weights=model.outside + sum(layer.stored for layer in model.layers),
        adapters=model.adapters + copies,
        gradients=model.trained_bytes,
        optimizer=round(model.trained * moments),
        matrices=max(shared, default=0) + sum(own),
    )
