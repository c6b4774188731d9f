"""A block that computes a layer by its `LayerSpec` alone, from the ops' references, differentiable in any dtype.

Whole models run through it prove detector and surgery, whatever the fused block does: a field of the spec that is wrong
is a wrong number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.models import fast_path
from pyralis.models.block_protocol import Prepared
from pyralis.models.fused import FusedBlock
from pyralis.models.policy import SavePolicy
from pyralis.models.spec import LayerSpec, NormSpec, Projection
from pyralis.ops import attention, glu, rms_norm
from pyralis.ops.attention_spec import AttentionLayout


class SpecBlock:
    """Counts what it ran: `calls`, `recomputed`, of these under gradient checkpointing, and the last `policy`."""

    def __init__(self) -> None:
        self.calls = self.recomputed = 0
        self.policy: SavePolicy = "keep"

    def prepare(self, layers: Sequence[tuple[nn.Module, LayerSpec]], kept: Any) -> Prepared:
        return Prepared([(layer, spec) for layer, spec in layers])

    def look(self, layers: Sequence[tuple[nn.Module, LayerSpec]], kept: Any) -> Prepared:
        return self.prepare(layers, kept)

    def release(self, kept: Any) -> None:
        raise AssertionError("nothing was kept")

    def run(
        self,
        handle: Any,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: AttentionLayout,
        *,
        policy: SavePolicy,
        tile: int | None = None,
    ) -> Tensor:
        self.calls += 1
        self.recomputed += policy != "keep"
        self.policy = policy
        layer, spec = handle
        rows, tokens, features = hidden_states.shape
        cos, sin = (t.expand(rows, tokens, -1).reshape(rows * tokens, -1) for t in (cos, sin))
        return layer_by_spec(layer, spec, hidden_states.reshape(-1, features), cos, sin, layout).view_as(hidden_states)


class CountedFused(FusedBlock):
    """The fused block, counted in the same way."""

    def __init__(self) -> None:
        self.calls = self.recomputed = 0
        self.policy: SavePolicy = "keep"

    def run(self, *args: Any, policy: SavePolicy, tile: int | None = None) -> Tensor:
        self.calls += 1
        self.recomputed += policy != "keep"
        self.policy = policy
        return super().run(*args, policy=policy, tile=tile)


@contextmanager
def block_in_place(block: Any) -> Iterator[Any]:
    before, fast_path.block = fast_path.block, block
    try:
        yield block
    finally:
        fast_path.block = before


def layer_by_spec(
    layer: nn.Module, spec: LayerSpec, x: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout
) -> Tensor:
    """[T, H] of [T, H]; cos, sin: [T, rotary_dim]."""

    def project(parts: tuple[Projection, ...], x: Tensor, *widths: int) -> tuple[Tensor, ...]:
        return torch.cat([layer.get_submodule(part.path)(x) for part in parts], -1).split(widths, -1)

    def norm(norm: NormSpec | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        weight = layer.get_submodule(norm.path).weight
        return rms_norm.reference(x, weight, norm.eps, unit_offset=norm.unit_offset)

    def rotated(x: Tensor, qk_norm: NormSpec | None) -> Tensor:
        x = norm(qk_norm, x.unflatten(-1, (-1, spec.attention.head_dim)))
        turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
        first, second = turned.chunk(2, -1)
        turned = turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        return torch.cat([turned, rest], -1).flatten(-2)

    q, k, v = project(spec.qkv, norm(spec.input_norm, x), *spec.qkv_features)
    q, k = rotated(q, spec.q_norm), rotated(k, spec.k_norm)
    out = attention.reference(q, k, v, spec.attention.within(layout.max_seqlen), layout)
    (out,) = project((spec.attention_out,), out, spec.hidden_size)
    x = x + norm(spec.post_attention_norm, out) * spec.residual_multiplier
    gate, up = project(spec.gate_up, norm(spec.pre_mlp_norm, x), *(spec.intermediate_size,) * 2)
    (out,) = project((spec.down,), glu.reference(gate, up, spec.activation), spec.hidden_size)
    return x + norm(spec.post_mlp_norm, out) * spec.residual_multiplier
