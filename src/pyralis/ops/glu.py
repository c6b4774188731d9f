"""Gated linear units between the gate/up and the down projection.

    h = act(gate) * up          act: silu (SwiGLU), gelu_tanh (GeGLU, Gemma), gelu (GeGLU with the exact erf)

The activation is rounded to the dtype before the product, as stock transformers does; all else is float32.
The backward yields h again (the down projection's LoRA needs it), d gate and d up in one pass.

Shapes: T rows (tokens), I intermediate features, P extra columns of a wide output row.
Source of the maths: Shazeer, GLU Variants Improve Transformer (2020); Hendrycks and Gimpel, GELU (2016).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyralis.ops._triton import (
    at_least_float32,
    cdiv,
    launch,
    next_power_of_2,
    round_to,
    store_as,
    tl,
    triton,
    unsupported_tensors,
    warps_for,
)

Activation = Literal["silu", "gelu_tanh", "gelu"]


class GLUGradients(NamedTuple):
    h: Tensor | None  # [T, I], the forward's output, when asked for
    dgate: Tensor  # [T, I]
    dup: Tensor  # [T, I]


@dataclass(frozen=True, slots=True)
class GLULaunch:
    """How a row of I features is cut into programs."""

    block: int  # columns of a tile, a power of two
    num_warps: int

    @classmethod
    @cache
    def of(cls, features: int) -> GLULaunch:
        # Eight elements a thread are one 16-byte load of each operand; three or four operands are in flight together.
        block = min(1024, next_power_of_2(features))
        return cls(block, warps_for(block, per_thread=8))


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Views (gate, up) [T, I] of a fused projection's output [T, 2 * I], for all functions here."""
    half = gate_up.shape[-1] // 2
    gate, up = gate_up.split_with_sizes((half, half), -1)
    return gate, up


def supported(gate: Tensor, up: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    return unsupported_tensors(gate, up, *others)


def activate(gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def reference(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """h of the equation above, rounded as stock rounds."""
    return activate(gate, activation) * up


def reference_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: Activation = "silu") -> tuple[Tensor, Tensor]:
    """(dgate, dup) in float32."""
    dtype = at_least_float32(gate.dtype)
    dh, gate, up = dh.to(dtype), gate.to(dtype), up.to(dtype)
    if activation == "silu":
        s = torch.sigmoid(gate)
        value, slope = gate * s, s * (1 + gate * (1 - s))
    elif activation == "gelu_tanh":
        z = 1.5957691216057308 * gate * (1 + 0.044715 * gate**2)  # (1 + tanh(z / 2)) / 2 = sigmoid(z)
        s = torch.sigmoid(z)
        value = gate * s
        slope = s + value * torch.sigmoid(-z) * 1.5957691216057308 * (1 + 3 * 0.044715 * gate**2)
    else:
        cdf = 0.5 * (1 + torch.erf(gate * 0.7071067811865476))
        value, slope = gate * cdf, cdf + gate * 0.3989422804014327 * torch.exp(-0.5 * gate * gate)
    return dh * up * slope, dh * value


def glu_forward(gate: Tensor, up: Tensor, activation: Activation = "silu", *, out: Tensor | None = None) -> Tensor:
    """h = act(gate) * up. No autograd; returns h [T, I], a view of `out` when that is given.

    gate, up: [T, I], any row stride (`split_gate_up` of a fused projection). out: [T, I] of any row stride, may be
    gate or up itself, or [T, I + P], whose P last columns are filled with zeros (room for LoRA's).
    """
    T, size = gate.shape
    out = torch.empty((T, size), dtype=gate.dtype, device=gate.device) if out is None else out
    h = out[:, :size]
    if supported(gate, up, out) is not None:
        h.copy_(reference(gate, up, activation))
        out[:, size:].zero_()
        return h
    plan = GLULaunch.of(size)
    P = out.shape[1] - size
    launch(
        _forward_kernel, (T, cdiv(size, plan.block)), gate, up, h, gate.stride(0), up.stride(0), h.stride(0),
        device=gate.device, num_warps=plan.num_warps,
        SIZE=size, P=P, BLOCK=plan.block, BLOCK_P=next_power_of_2(P), ACTIVATION=activation,
    )  # fmt: skip
    return h


def glu_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: Activation = "silu",
    *,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    h_out: Tensor | None = None,
    need_h: bool = True,
) -> GLUGradients:
    """dgate and dup, and h once more unless `need_h` is off. No autograd.

    dh, gate, up: [T, I], any row stride. dgate, dup may be gate and up themselves (the usual case: in place over the
    fused gate_up), h_out may be dh. Those not given are allocated.
    """
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format) if dgate is None else dgate
    dup = torch.empty_like(up, memory_format=torch.contiguous_format) if dup is None else dup
    if h_out is None and need_h:
        h_out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if supported(gate, up, dh, dgate, dup, h_out) is not None:
        grad_gate, grad_up = reference_backward(dh, gate, up, activation)
        if h_out is not None:
            h_out.copy_(reference(gate, up, activation))
        dgate.copy_(grad_gate)
        dup.copy_(grad_up)
        return GLUGradients(h_out, dgate, dup)
    T, size = gate.shape
    plan = GLULaunch.of(size)
    launch(
        _backward_kernel, (T, cdiv(size, plan.block)), dh, gate, up, h_out, dgate, dup,
        dh.stride(0), gate.stride(0), up.stride(0), 0 if h_out is None else h_out.stride(0),
        dgate.stride(0), dup.stride(0), device=gate.device, num_warps=plan.num_warps,
        SIZE=size, BLOCK=plan.block, ACTIVATION=activation,
    )  # fmt: skip
    return GLUGradients(h_out, dgate, dup)


@triton.jit
def activate_tile(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) in float32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(y)) / 2 = sigmoid(z), z = 2 y: neither it nor its complement cancels; 2 * sqrt(2 / pi) = 1.5957691
        z = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        e = tl.exp(-tl.abs(z))
        large = 1.0 / (1.0 + e)
        s = tl.where(z > 0, large, e * large)
        value = g * s
        slope = s + value * tl.where(z > 0, e * large, large) * (1.5957691216057308 + 0.2140644488 * g * g)
    else:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * cdf
        slope = cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    return value, slope


@triton.jit
def _forward_kernel(
    gate, up, out, gate_stride, up_stride, out_stride,
    SIZE: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < SIZE
    g = tl.load(gate + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    value, _ = activate_tile(g, ACTIVATION)
    store_as(out + row * out_stride + col, round_to(value, gate.dtype.element_ty) * u, mask)
    if P > 0 and tl.program_id(1) == 0:
        extra = tl.arange(0, BLOCK_P)
        store_as(out + row * out_stride + SIZE + extra, tl.zeros([BLOCK_P], tl.float32), extra < P)


@triton.jit
def _backward_kernel(
    dh, gate, up, h_out, dgate, dup, dh_stride, gate_stride, up_stride, h_stride, dgate_stride, dup_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < SIZE
    d = tl.load(dh + row * dh_stride + col, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate_tile(g, ACTIVATION)
    if h_out is not None:
        store_as(h_out + row * h_stride + col, round_to(value, gate.dtype.element_ty) * u, mask)
    store_as(dgate + row * dgate_stride + col, d * u * slope, mask)
    store_as(dup + row * dup_stride + col, d * value, mask)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        size = gate.shape[-1]
        return glu_forward(gate.reshape(-1, size), up.reshape(-1, size), activation).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dh, gate_rows, up_rows = (t.reshape(-1, t.shape[-1]) for t in (dh, gate, up))
        _, dgate, dup = glu_backward(dh, gate_rows, up_rows, ctx.activation, need_h=False)
        return dgate.view(gate.shape), dup.view(up.shape), None


def glu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """act(gate) * up for gate, up [..., I], differentiable in both."""
    return _GLU.apply(gate, up, activation)
