"""Time: what a layer's products, attention and passes over memory take, from shapes and a GPU's rates.

    products          2 T N K / matmul rate, LoRA's columns included; twice in a backward, thrice with trained weights
    attention         4 pairs Q floating-point operations forward, 10 backward, at a share of the matmul rate
    elementwise       bytes read and written / copy rate: norms, RoPE, act(gate) * up, copies
    adapters          LoRA's thin products read their operands once each, at half of the copy rate
    dequantisation    4-bit weights read and made for the forward and again for the backward, unless they are kept

The shares were fitted to two steps of Llama-3-8B on one H100 (docs/plan.md): 1 x 1024 tokens, 67 ms of kernels, and
2 x 2048, 236 ms (wall 250). Letters: T tokens, H hidden size, I intermediate, Q heads times head size, e bytes of an
element.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from pyralis.memory.gpus import GpuRates
from pyralis.memory.shape import GroupShape, LayerShape, ModelShape
from pyralis.models.policy import RECOMPUTING, SavePolicy, makes_product_again

PRODUCTS = 0.91  # of the matmul rate, at a model's shapes
ATTENTION_FORWARD, ATTENTION_BACKWARD = 0.80, 0.55  # of the matmul rate, at long sequences
ATTENTION_HALF = 650  # tokens of a sequence at which half of that is reached
OLD_ATTENTION = 0.5  # of these before compute capability 8.0
ELEMENTWISE, THIN, DEQUANTISE = 0.95, 0.5, 0.93  # of the copy rate
# Kernels: of a layer forward and backward, and what a policy adds; outside of the layers.
KERNELS, KERNELS_OUTSIDE = 50, 120
KERNELS_TILE = 24  # of a tile of the MLP: forward, again and backward
KERNELS_IN_TURN = 9  # that make matrices one after another, of a layer that recomputes, above two at once
KERNELS_AGAIN: dict[SavePolicy, int] = {"keep": 0, "recompute_cheap": 4, "recompute_layer": 18, "offload_input": 22}


@dataclass(frozen=True, slots=True)
class Batch:
    """rows x length tokens, padding included. supervised: of them, that reach the head; None: all.

    document: mean length of the sequences packed into a row; None: a row is one.
    """

    rows: int
    length: int
    supervised: int | None = None
    document: float | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def learnt(self) -> int:
        return self.tokens if self.supervised is None else min(self.supervised, self.tokens)

    def pairs(self, window: int | None) -> float:
        """Of a query and a key that it sees."""
        seen = min(self.length, self.document or self.length)
        if window is None or window >= seen:
            return self.tokens * (seen + 1) / 2
        return self.tokens * (window - window * (window - 1) / (2 * seen))


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of a step, by part. launches: where the CPU is slower than the GPU, what that adds."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    adapters: float = 0.0
    dequantisation: float = 0.0
    head: float = 0.0
    optimizer: float = 0.0
    transfers: float = 0.0
    launches: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def layer_seconds(layer: LayerShape, batch: Batch, rates: GpuRates) -> tuple[Seconds, Seconds]:
    """(forward, backward) of a layer that keeps everything and whose matrices are there."""
    return _forward(layer, batch, rates, whole=True), _backward(layer, batch, rates)


def again_seconds(layer: LayerShape, policy: SavePolicy, batch: Batch, rates: GpuRates) -> Seconds:
    """What a policy adds to the backward; for `offload_input` without the transfer."""
    if policy == "keep":
        return Seconds()
    spec, e, down = layer.spec, layer.element_size, layer.groups[3]
    moved = 2 * spec.hidden_size * (layer.residual_size + e)
    if not makes_product_again(down.group, down.trains_base):
        moved += spec.intermediate_size * e
    if spec.q_norm is not None:
        moved += 2 * sum(spec.qkv_features[:2]) * e
    cheap = Seconds(elementwise=_passes(moved * batch.tokens, rates))
    return cheap if policy == "recompute_cheap" else cheap + _forward(layer, batch, rates, whole=False)


def tiles_seconds(layer: LayerShape, batch: Batch, rates: GpuRates, tile: int) -> Seconds:
    """What the MLP in tiles adds: rows put in their place, and trained weights' gradients read and written anew."""
    count = -(-batch.tokens // tile)
    moved = 2 * batch.tokens * layer.spec.hidden_size * layer.residual_size
    moved += 8 * (count - 1) * sum(group.weights for group in layer.groups[2:] if group.trains_base)
    return Seconds(elementwise=_passes(moved + 2 * layer.tile_sums, rates))


def matrices_seconds(
    layer: LayerShape, rates: GpuRates, policy: SavePolicy, *, in_turn: bool = False, tiles: int = 1
) -> float:
    """Of making a layer's matrices for a step; 0 where they lie as they are.

    in_turn: each takes the place of the one before; then with MLPs in `tiles` two of them are made for each tile.
    """
    if not layer.made:
        return 0.0
    weights = 2 * layer.weights
    if in_turn:
        attention, mlp = (sum(group.weights for group in groups) for groups in (layer.groups[:2], layer.groups[2:]))
        again = attention + layer.groups[2].weights if policy in RECOMPUTING else 0
        weights = 2 * (attention + tiles * mlp) + again
    source = 0.516 if layer.four_bit else 4.0
    return weights * (source + layer.element_size) / (DEQUANTISE * rates.copy_bytes_per_s)


def transfer_seconds(layer: LayerShape, batch: Batch, rates: GpuRates) -> float:
    """Of moving a layer's input between device and host, one way."""
    return batch.tokens * layer.spec.hidden_size * layer.residual_size / rates.host_bytes_per_s


def outside_seconds(model: ModelShape, batch: Batch, rates: GpuRates, accumulation: int) -> Seconds:
    """Head, loss, embedding and final norm; and of the optimizer the share of one micro-step."""
    rows, hidden, e = batch.learnt, model.hidden_size, model.head_size
    products = (3 if model.head_trained else 2) * 2 * rows * hidden * model.vocabulary
    loss = rows * model.vocabulary * e * 3  # the logits are read twice and written once, beside the products
    norm = batch.tokens * hidden * (5 * e if model.fused_norm else 4 * 16)
    head = products / (PRODUCTS * rates.matmul_flops_per_s) + _passes(loss + norm, rates)
    copies = sum(group.copied for layer in model.layers for group in layer.groups) * 6
    optimizer = _passes(model.trained * 30, rates) / accumulation + _passes(copies, rates)
    return Seconds(head=head, optimizer=optimizer)


def _passes(moved: float, rates: GpuRates) -> float:
    return moved / (ELEMENTWISE * rates.copy_bytes_per_s)


def _forward(layer: LayerShape, batch: Batch, rates: GpuRates, *, whole: bool) -> Seconds:
    """whole: with act(gate) * up and the down projection, which are never computed again."""
    spec, e, T = layer.spec, layer.element_size, batch.tokens
    hidden, residual = spec.hidden_size * e, spec.hidden_size * layer.residual_size
    q, k, _ = spec.qkv_features
    groups = layer.groups if whole else layer.groups[:3]
    moved = 3 * residual + 3 * hidden + 2 * (q + k) * e
    moved += 2 * spec.query_features * e if layer.groups[1].group.pad else 0
    moved += residual + 3 * spec.intermediate_size * e if whole else 0
    moved += 3 * e * sum(group.group.out_features for group in groups if group.group.dora)
    norms = e * sum(group.weights for group in layer.groups if group.group.dora)  # DoRA's, of W + s B A
    moved += 2 * hidden * (int(spec.post_attention_norm is not None) + int(whole and spec.post_mlp_norm is not None))
    return Seconds(
        products=sum(_product(group, T) for group in groups) / (PRODUCTS * rates.matmul_flops_per_s),
        attention=_attention(layer, batch, rates, 4, ATTENTION_FORWARD),
        elementwise=_passes(moved * T + norms, rates),
        adapters=sum(_thin(group, T, e, backward=False) for group in groups) / (THIN * rates.copy_bytes_per_s),
    )


def _backward(layer: LayerShape, batch: Batch, rates: GpuRates) -> Seconds:
    spec, e, T = layer.spec, layer.element_size, batch.tokens
    hidden, residual = spec.hidden_size * e, spec.hidden_size * layer.residual_size
    q, k, v = spec.qkv_features
    moved = 2 * (hidden + 3 * residual) + 5 * spec.intermediate_size * e + 2 * (q + k + v) * e
    moved += 3 * hidden * (int(spec.post_attention_norm is not None) + int(spec.post_mlp_norm is not None))
    flops = sum(2 * T * g.group.in_features * g.rows + 2 * T * g.weights * g.trains_base for g in layer.groups)
    return Seconds(
        products=flops / (PRODUCTS * rates.matmul_flops_per_s),
        attention=_attention(layer, batch, rates, 10, ATTENTION_BACKWARD),
        elementwise=_passes(moved * T, rates),
        adapters=sum(_thin(group, T, e, backward=True) for group in layer.groups) / (THIN * rates.copy_bytes_per_s),
    )


def _product(group: GroupShape, tokens: int) -> float:
    return 2 * tokens * group.group.out_features * group.columns


def _thin(group: GroupShape, tokens: int, e: int, *, backward: bool) -> float:
    """Bytes that LoRA's own products move: x A^T, and each B where it lies apart; backward dy B with dB, and t^T x."""
    lora = group.group
    if not lora.rank:
        return 0.0
    apart = 0 if group.wide else 2 * sum(lora.projections[j].out_features for j in lora.adapted)
    dropout = lora.in_features * (2 if backward else 1) if lora.has_dropout else 0
    if not backward:
        return tokens * e * (lora.in_features + apart + dropout)
    read = lora.out_features + lora.in_features * (1 if group.trains_A else 0)
    return tokens * e * (read + dropout + (0 if group.wide else 2 * lora.in_features))


def _attention(layer: LayerShape, batch: Batch, rates: GpuRates, flops_per_pair: int, share: float) -> float:
    seen = min(batch.length, batch.document or batch.length)
    reached = share * seen / (seen + ATTENTION_HALF)
    if rates.capability < (8, 0):
        reached *= OLD_ATTENTION
    flops = flops_per_pair * batch.pairs(layer.spec.attention.window) * layer.spec.query_features
    return flops / (reached * rates.matmul_flops_per_s)
