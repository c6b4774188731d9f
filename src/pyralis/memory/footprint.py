"""Bytes: what a layer keeps between its forward and its backward, and what a step holds besides.

Counted from what the code keeps (`models/block_forward.py`), tensor by tensor; the allocator's rounding to 512 bytes is
left out. Letters as there: T tokens, H hidden size, e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyralis.memory.shape import GroupShape, LayerShape, ModelShape
from pyralis.models.policy import SavePolicy
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
    spec, e = layer.spec, layer.element_size
    hidden, residual = spec.hidden_size * e, spec.hidden_size * layer.residual_size
    qkv, attention_out, gate_up, down = layer.groups
    down_out = hidden + _statistics(spec.post_mlp_norm.kind) if spec.post_mlp_norm is not None else 0
    down_out += hidden if down.trains_magnitude else 0
    if policy == "offload_input":
        return down_out
    if policy == "recompute_layer":
        return residual + down_out
    keep = policy == "keep"
    heads, kv_heads = spec.attention.num_heads, spec.attention.num_kv_heads
    total = residual + down_out  # the input
    total += _input(qkv, e, keep) + e * qkv.group.out_features * (2 if qkv.trains_magnitude else 1)
    total += e * attention_out.group.width + 4 * heads + _apart(layer)
    if spec.q_norm is not None:
        total += 4 * (heads + kv_heads)
        total += e * sum(spec.qkv_features[:2]) if keep else 0
    if spec.post_attention_norm is not None:
        total += hidden + _statistics(spec.post_attention_norm.kind)
    total += hidden if attention_out.trains_magnitude else 0
    total += residual  # between attention and MLP
    total += _statistics(spec.input_norm.kind) + _statistics(spec.pre_mlp_norm.kind)
    total += _input(gate_up, e, keep)
    if gate_up.trains_magnitude:  # the product without DoRA's magnitudes, of which the one with them is made again
        total += e * gate_up.group.out_features
    if not gate_up.trains_magnitude or gate_up.group.has_dropout:
        total += e * gate_up.rows
    return total + _input(down, e, keep)


def _statistics(kind: str) -> int:
    return 8 if kind == "layer" else 4


def _input(group: GroupShape, e: int, keep: bool) -> int:
    """Of a group's input and its LoRA columns."""
    if keep and group.reads_input:
        return e * group.group.width
    return e * group.group.rank if group.trains_B else 0


def _apart(layer: LayerShape) -> int:
    """The output that attention by autograd (softcaps) keeps beside the copy with LoRA's columns."""
    copied = layer.groups[1].group.pad > 0
    return layer.element_size * layer.spec.query_features if layer.spec.attention.softcap is not None and copied else 0


def computed_per_token(layer: LayerShape) -> int:
    """Bytes that a forward leaves behind before a policy drops anything, its input and output included."""
    spec, e = layer.spec, layer.element_size
    dropped = sum(e * g.group.width - _input(g, e, True) for g in (layer.groups[0], layer.groups[2], layer.groups[3]))
    gate_up = layer.groups[2]
    if gate_up.trains_magnitude and not gate_up.group.has_dropout:
        dropped += e * gate_up.rows
    return kept_per_token(layer, "keep") + dropped + spec.hidden_size * layer.residual_size


def backward_per_token(layer: LayerShape) -> int:
    """The most that a layer's backward holds beside what was kept: in the MLP dy, a copy of it with room for LoRA and
    the gradient of act(gate) * up; or in attention dy, the heads' gradients, those of q, k and v twice, and the
    float32 sums that kernels keep of dq."""
    _, _, gate_up, down = layer.groups
    residual = layer.spec.hidden_size * layer.residual_size
    given_back = layer.element_size * (gate_up.rows + down.group.width)
    return residual + max(_mlp_backward(layer), _attention_backward(layer) - given_back, 0)


def _mlp_backward(layer: LayerShape) -> int:
    """Without dy."""
    spec, e, down = layer.spec, layer.element_size, layer.groups[3]
    norm = spec.hidden_size * e if spec.post_mlp_norm is not None else 0
    return (e * down.rows if down.wide else 0) + e * spec.intermediate_size + norm


def _attention_backward(layer: LayerShape) -> int:
    """Without dy."""
    spec, e = layer.spec, layer.element_size
    return e * (2 * spec.query_features + sum(spec.qkv_features) + layer.groups[0].rows) + 4 * spec.query_features


@dataclass(frozen=True, slots=True)
class TiledBytes:
    """The most that a recomputing layer's forward, and its backward, hold while its MLP runs in tiles: input, output
    and what was kept included."""

    forward: int
    backward: int


def tiled_bytes(layer: LayerShape, tokens: int, tile: int) -> TiledBytes:
    """tile: tokens of a tile, fewer than `tokens`. See `models/block_tiles.py`: of attention all is there in the
    backward; in the forward it is given back before the MLP starts. The gradient of the residual stream takes the
    memory of attention's output where dtypes allow."""
    spec, e = layer.spec, layer.element_size
    residual, hidden = spec.hidden_size * layer.residual_size, spec.hidden_size * e
    _, _, gate_up, down = layer.groups
    kept = kept_per_token(layer, "offload_input")
    mlp = _statistics(spec.pre_mlp_norm.kind) + e * (gate_up.group.width + gate_up.rows + down.group.width)
    mlp += e * gate_up.group.out_features if gate_up.trains_magnitude else 0
    attention = computed_per_token(layer) - mlp - kept - residual
    wider = layer.residual_size != e and spec.post_attention_norm is None  # the stream than what attention adds
    branch = hidden if wider else residual
    attention -= residual - branch
    mlp += residual if wider else 0
    forward = max(tokens * attention, tokens * (2 * residual + branch + kept) + tile * (mlp + residual + kept))
    gradient = residual if wider else 0
    in_mlp = tokens * (attention + residual + kept + gradient) + tile * (mlp + _mlp_backward(layer)) + layer.tile_sums
    in_attention = tokens * (attention - (branch if wider else 0) + gradient + residual + kept)
    return TiledBytes(forward, max(in_mlp, in_attention + tokens * _attention_backward(layer)))


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """Of the loss. forward: at its peak, the last layer's output included; kept: until the backward's first layer."""

    forward: int
    backward: int


def head_bytes(model: ModelShape, tokens: int, supervised: int, chunk_bytes: int | None) -> HeadBytes:
    """supervised: rows that reach the head. The final norm is stock's: it keeps a float32 copy, and its backward makes
    four more."""
    hidden, e = model.hidden_size, model.head_size
    rows, left_out = min(supervised, tokens), supervised < tokens
    stride = -(-model.vocabulary // 64) * 64
    chunk = GPU_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    weight = model.vocabulary * hidden
    if model.head_trained and chunk_bytes is None:
        chunk = max(chunk, weight * e)
    logits = min(rows * stride * e, max(chunk, stride * e))
    norm = tokens * hidden * (4 + 2 * e)  # float32, normalised, and the output
    gradient = rows * hidden * e * (2 if left_out else 1)
    trained = weight * 4 if model.head_trained else 0
    forward = norm + logits + gradient + trained
    return HeadBytes(forward, tokens * hidden * (5 * 4 + 2 * e) + trained)


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


def standing_bytes(model: ModelShape, resident: tuple[bool, ...], moments: float) -> Standing:
    """resident: of each layer, whether its matrices are kept. moments: bytes of the optimizer per trained parameter."""
    shared = [layer.matrices for layer, kept in zip(model.layers, resident) if not kept]
    own = [layer.matrices for layer, kept in zip(model.layers, resident) if kept]
    copies = sum(group.copied * layer.element_size for layer in model.layers for group in layer.groups)
    return Standing(
        weights=model.outside + sum(layer.stored for layer in model.layers),
        adapters=model.adapters + copies,
        gradients=model.trained_bytes,
        optimizer=round(model.trained * moments),
        matrices=max(shared, default=0) + sum(own),
    )
