"""SwiGLU and GeGLU on a fused gate_up, forward and the one-pass backward."""

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
from pyralis.ops.glu import Activation, glu_backward, glu_forward, reference, split_gate_up


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return reference(gate, up, "silu")


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return reference(gate, up, "gelu_tanh")


STOCK_GLU = {"silu": _silu, "gelu_tanh": _gelu_tanh}


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    size, dtype = shape.intermediate, torch.bfloat16
    row = tokens * size * dtype.itemsize
    found = []
    for activation in ("silu", "gelu_tanh"):
        forward, backward = _pair(activation, tokens, size, dtype)  # type: ignore[arg-type]
        found.append(BenchCase(f"glu {activation}, forward", shape.name, tokens, forward, 3 * row))
        # dh, gate, up -> h, dgate, dup; the peers do without h
        found.append(BenchCase(f"glu {activation}, backward", shape.name, tokens, backward, 6 * row))
    return found


def _pair(activation: Activation, tokens: int, size: int, dtype: torch.dtype) -> tuple:
    stock = STOCK_GLU[activation]

    def forward(device: torch.device) -> dict[str, Contender]:
        gate, up = split_gate_up(torch.randn(tokens, 2 * size, dtype=dtype, device=device))
        h = torch.empty(tokens, size, dtype=dtype, device=device)
        found: dict[str, Contender] = {
            PYRALIS: lambda: glu_forward(gate, up, activation, out=h),
            STOCK: lambda: stock(gate, up),
            COMPILED: lambda: compiled(stock)(gate, up),
        }
        if activation == "silu" and has("liger_kernel") and device.type == "cuda":
            from liger_kernel.ops.swiglu import swiglu_forward

            own_gate, own_up = gate.contiguous(), up.contiguous()
            found[LIGER] = lambda: swiglu_forward(own_gate, own_up)[-1]
        return found

    def backward(device: torch.device) -> dict[str, Contender]:
        gate, up = split_gate_up(torch.randn(tokens, 2 * size, dtype=dtype, device=device))
        dh, h = torch.randn((2, tokens, size), dtype=dtype, device=device)
        dgate, dup = split_gate_up(torch.empty(tokens, 2 * size, dtype=dtype, device=device))
        return {
            PYRALIS: lambda: glu_backward(dh, gate, up, activation, dgate=dgate, dup=dup, h_out=h)[1:],
            STOCK: backward_of(stock, (gate, up), dh),
            COMPILED: backward_of(compiled(stock), (gate, up), dh),
        }

    return forward, backward
