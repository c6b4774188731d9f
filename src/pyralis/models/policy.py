"""What a layer keeps between its forward and its backward.

    keep               everything the backward reads
    recompute_cheap    norm outputs, h = act(gate) * up and, with q/k norms, the rotated q and k are computed anew
    recompute_layer    the layer's input alone; all but the down projection is computed anew
    offload_input      as recompute_layer, with the input in pinned host memory meanwhile

The down projection's output is never computed again: nothing reads it but a norm behind it (Gemma 2 and 3), for which
it is kept. Gradients are the same for every policy.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from torch import Tensor

from pyralis.models.spec import LayerSpec

SavePolicy = Literal["keep", "recompute_cheap", "recompute_layer", "offload_input"]
POLICIES: tuple[SavePolicy, ...] = get_args(SavePolicy)


class InputStore(Protocol):
    """Where `offload_input` keeps layer inputs."""

    def put(self, tensor: Tensor) -> object:
        """Start moving `tensor` away; returns what `get` takes."""
        ...

    def get(self, handle: object) -> Tensor:
        """The tensor again, where it was, usable on the current stream."""
        ...


def saved_bytes_per_token(
    spec: LayerSpec,
    policy: SavePolicy,
    element_size: int = 2,
    *,
    ranks: tuple[int, int, int, int] = (0, 0, 0, 0),
    residual_size: int | None = None,
) -> int:
    """Device bytes that a layer keeps for each token, the layer's input included, allocator rounding left out.

    ranks: LoRA's R of qkv, attention_out, gate_up and down. residual_size: bytes of an element of the residual
    stream, by default element_size. All LoRA of a group is taken to be trained; statistics are float32.
    """
    residual = spec.hidden_size * (element_size if residual_size is None else residual_size)
    hidden, inner = spec.hidden_size * element_size, spec.intermediate_size * element_size
    after_down = (hidden + 4) if spec.post_mlp_norm is not None else 0
    if policy == "offload_input":
        return after_down
    if policy == "recompute_layer":
        return residual + after_down
    heads, kv_heads = spec.attention.num_heads, spec.attention.num_kv_heads
    qkv = sum(spec.qkv_features) * element_size
    statistics = 4 * (2 + heads)  # two norms, and attention's logsumexp
    total = 2 * residual + qkv + spec.query_features * element_size + 2 * inner + statistics + after_down
    total += sum(ranks) * element_size
    if spec.q_norm is not None:
        total += 4 * (heads + kv_heads)
    if spec.post_attention_norm is not None:
        total += hidden + 4
    if policy == "recompute_cheap":
        return total
    total += hidden * (ranks[0] > 0) + hidden * (ranks[2] > 0) + inner * (ranks[3] > 0)
    if spec.q_norm is not None:
        total += (spec.query_features + spec.qkv_features[1]) * element_size
    return total
