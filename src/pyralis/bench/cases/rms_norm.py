"""RMS norm with the residual addition, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.bench.case import (
    COMPILED,
    LIGER,
    PYRALIS,
    STOCK,
    BenchCase,
    Contender,
    ModelShape,
    backward_of,
    compiled,
    has,
)
from pyralis.ops.rms_norm import reference, rms_norm_backward, rms_norm_forward

EPS = 1e-5


def _stock(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return reference(h, weight, EPS), h


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    N, dtype = shape.hidden, torch.bfloat16

    def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        x, residual = torch.randn((2, tokens, N), dtype=dtype, device=device)
        return x, residual, 1 + 0.1 * torch.randn(N, dtype=dtype, device=device)

    def forward(device: torch.device) -> dict[str, Contender]:
        x, residual, weight = inputs(device)
        y, h = torch.empty((2, tokens, N), dtype=dtype, device=device)
        found: dict[str, Contender] = {
            PYRALIS: lambda: rms_norm_forward(x, weight, EPS, residual=residual, out=y, h_out=h)[:2],
            STOCK: lambda: _stock(x, residual, weight),
            COMPILED: lambda: compiled(_stock)(x, residual, weight),
        }
        if has("liger_kernel") and device.type == "cuda":
            from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

            found[LIGER] = lambda: fused_add_rms_norm_forward(x, residual, weight, EPS, 0.0, "llama")[:2]
        return found

    def backward(device: torch.device) -> dict[str, Contender]:
        x, residual, weight = inputs(device)
        dy, dh = torch.randn((2, tokens, N), dtype=dtype, device=device)
        _, h, rstd = rms_norm_forward(x, weight, EPS, residual=residual)
        dx = torch.empty_like(dy)
        return {
            PYRALIS: lambda: rms_norm_backward(dy, h, weight, rstd, residual_grad=dh, out=dx),
            STOCK: backward_of(lambda x: _stock(x, residual, weight), (x,), dy, dh),
            COMPILED: backward_of(lambda x: compiled(_stock)(x, residual, weight), (x,), dy, dh),
        }

    moved = 4 * tokens * N * dtype.itemsize  # x, residual -> h, y; dy, h, dh -> dx
    return [
        BenchCase("rms_norm + residual, forward", shape.name, tokens, forward, moved),
        BenchCase("rms_norm + residual, backward", shape.name, tokens, backward, moved),
    ]
