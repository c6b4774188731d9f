"""Causal attention, forward and backward: rows of up to 2048 tokens, and packed documents of up to 512.

Ours is the backend that `backend_for` takes; the others that serve are beside it by name, and torch's SDPA as
transformers calls it: causal for full rows, with a mask over all tokens for packed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyralis.bench.case import PYRALIS, STOCK, BenchCase, Contender, ModelShape, backward_of
from pyralis.ops.attention import (
    AttentionLayout,
    AttentionSpec,
    attention_backward,
    attention_forward,
    backend_for,
)
from pyralis.ops.attention_reference import visible

ROW, DOCUMENT = 2048, 512
DTYPE = torch.bfloat16


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    spec = AttentionSpec(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5)
    found = []
    for kind, longest in (("rows", ROW), ("packed", DOCUMENT)):
        length = min(longest, tokens)
        whole = tokens // length * length
        flops = 2 * whole * length * shape.heads * shape.head_dim  # two products over the lower half of the scores
        moved = 2 * whole * (shape.heads + shape.kv_heads) * shape.head_dim * DTYPE.itemsize  # q, k, v -> out
        for name, backward in (("forward", False), ("backward", True)):
            contenders = partial(_contenders, spec, whole // length, length, kind == "packed", backward)
            work = (2 * moved, flops * 5 // 2) if backward else (moved, flops)
            found.append(BenchCase(f"attention {kind}, {name}", shape.name, whole, contenders, *work, DTYPE))
    return found


def _layout(sequences: int, length: int, packed: bool, device: torch.device) -> AttentionLayout:
    if not packed:
        return AttentionLayout.padded(sequences, length)
    bounds = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=device)
    return AttentionLayout.packed(bounds, length, sequences * length)


def _contenders(
    spec: AttentionSpec, sequences: int, length: int, packed: bool, backward: bool, device: torch.device
) -> dict[str, Contender]:
    layout = _layout(sequences, length, packed, device)
    widths = [heads * spec.head_dim for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
    q, k, v = torch.randn((layout.tokens, sum(widths)), dtype=DTYPE, device=device).split(widths, 1)
    dout = torch.randn((layout.tokens, widths[0]), dtype=DTYPE, device=device)
    stock = _stock(spec, layout, device)
    choice = backend_for(spec, layout, DTYPE, device)

    def ours(backend: str) -> Contender:
        if not backward:
            return lambda: attention_forward(q, k, v, spec, layout, backend=backend)[0]
        _, saved = attention_forward(q, k, v, spec, layout, backend=backend)
        return lambda: attention_backward(dout, saved)

    found = {PYRALIS: ours(choice.name)}
    for name in choice.alternatives:
        if name in ("flash", "efficient"):  # those without a graph, which one backward uses up
            found[name] = ours(name)
    found[STOCK] = backward_of(stock, (q, k, v), dout) if backward else lambda: stock(q, k, v)
    return found


def _stock(spec: AttentionSpec, layout: AttentionLayout, device: torch.device) -> Callable[..., Tensor]:
    mask = None if layout.cu_seqlens is None else visible(spec, layout, device)[None, None]

    def run(*qkv: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (-1, spec.head_dim)).unflatten(0, (layout.batch, -1)).transpose(1, 2) for t in qkv)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(layout.tokens, -1)

    return run
