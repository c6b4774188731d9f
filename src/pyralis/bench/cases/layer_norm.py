"""Layer norm, forward and backward with the weight's and the bias's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.bench.case import COMPILED, PYRALIS, STOCK, BenchCase, Contender, ModelShape, backward_of, compiled
from pyralis.ops.layer_norm import layer_norm_backward, layer_norm_forward, reference

EPS = 1e-5


def _stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(x, weight, bias, EPS)


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    N, dtype = shape.hidden, torch.bfloat16

    def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        weight = 1 + 0.1 * torch.randn(N, dtype=dtype, device=device)
        return torch.randn(tokens, N, dtype=dtype, device=device), weight, torch.randn(N, dtype=dtype, device=device)

    def forward(device: torch.device) -> dict[str, Contender]:
        x, weight, bias = inputs(device)
        y = torch.empty_like(x)
        return {
            PYRALIS: lambda: layer_norm_forward(x, weight, bias, EPS, out=y).y,
            STOCK: lambda: _stock(x, weight, bias),
            COMPILED: lambda: compiled(_stock)(x, weight, bias),
        }

    def backward(device: torch.device) -> dict[str, Contender]:
        x, weight, bias = inputs(device)
        dy = torch.randn_like(x)
        _, _, mean, rstd = layer_norm_forward(x, weight, bias, EPS)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)

        def ours() -> tuple[Tensor, ...]:
            layer_norm_backward(dy, x, weight, mean, rstd, out=dx, dweight=dweight, dbias=dbias)
            return dx, dweight, dbias

        return {
            PYRALIS: ours,
            STOCK: backward_of(_stock, (x, weight, bias), dy),
            COMPILED: backward_of(compiled(_stock), (x, weight, bias), dy),
        }

    row = tokens * N * dtype.itemsize
    return [
        BenchCase("layer_norm, forward", shape.name, tokens, forward, 2 * row),
        BenchCase("layer_norm, backward, trained", shape.name, tokens, backward, 3 * row),
    ]
