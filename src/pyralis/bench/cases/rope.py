"""RoPE of q and k in a fused qkv row, and with their norms (Qwen3)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.bench.case import COMPILED, PYRALIS, STOCK, BenchCase, Contender, ModelShape, backward_of, compiled
from pyralis.ops.rope import QKNorm, reference, rope_backward, rope_forward, split_qkv


def _stock(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference(q, k, cos, sin)


def _stock_normed(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    return reference(q, k, cos, sin, norm=QKNorm(q_weight, k_weight, 1e-6))


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    H, KV, D, dtype = shape.heads, shape.kv_heads, shape.head_dim, torch.bfloat16

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        qkv = torch.randn(tokens, (H + 2 * KV) * D, dtype=dtype, device=device)
        angles = torch.arange(tokens, device=device)[:, None] * 5e5 ** (-torch.arange(0, D, 2, device=device) / D)
        angles = torch.cat([angles, angles], -1)
        q, k, _ = split_qkv(qkv, H, KV)
        return q, k, angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(device: torch.device) -> dict[str, Contender]:
        q, k, cos, sin = inputs(device)
        ours_q, ours_k, *_ = inputs(device)
        ours_q.copy_(q)
        ours_k.copy_(k)
        return {
            STOCK: lambda: _stock(q, k, cos, sin),
            COMPILED: lambda: compiled(_stock)(q, k, cos, sin),
            PYRALIS: lambda: rope_forward(ours_q, ours_k, cos, sin)[:2],
        }

    def backward(device: torch.device) -> dict[str, Contender]:
        q, k, cos, sin = inputs(device)
        dq, dk, *_ = inputs(device)
        ours_q, ours_k, *_ = inputs(device)  # in place over a fused row, as in a layer
        ours_q.copy_(dq)
        ours_k.copy_(dk)
        return {
            STOCK: backward_of(lambda q, k: _stock(q, k, cos, sin), (q, k), dq, dk),
            COMPILED: backward_of(lambda q, k: compiled(_stock)(q, k, cos, sin), (q, k), dq, dk),
            PYRALIS: lambda: rope_backward(ours_q, ours_k, cos, sin),
        }

    def normed(device: torch.device) -> dict[str, Contender]:
        q, k, cos, sin = inputs(device)
        weights = 1 + 0.1 * torch.randn(2, D, dtype=dtype, device=device)
        norm = QKNorm(weights[0], weights[1], 1e-6)
        q_out, k_out, *_ = inputs(device)
        return {
            STOCK: lambda: _stock_normed(q, k, cos, sin, *weights),
            COMPILED: lambda: compiled(_stock_normed)(q, k, cos, sin, *weights),
            PYRALIS: lambda: rope_forward(q, k, cos, sin, norm=norm, q_out=q_out, k_out=k_out)[:2],
        }

    row = tokens * (H + KV) * D * dtype.itemsize
    table = tokens * D * dtype.itemsize  # half of cos and half of sin
    return [
        BenchCase("rope, forward", shape.name, tokens, forward, 2 * row + table),
        BenchCase("rope, backward", shape.name, tokens, backward, 2 * row + table),
        BenchCase("qk-norm + rope, forward", shape.name, tokens, normed, 2 * row + table + 4 * tokens * (H + KV)),
    ]
