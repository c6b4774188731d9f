"""Layer norm, with the residual addition before it and its gradient in the same passes.

    h = x + residual                              rounded to h's dtype
    y = (h - mean(h)) * rstd * weight + bias      float32, rounded once; rstd = 1 / sqrt(var(h) + eps)

Shapes: T rows (tokens), N features, P extra columns of a wide output row.
Source of the maths: Ba, Kiros and Hinton, Layer Normalization (2016).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyralis.ops._norm import MAX_FEATURES, RowLaunch, norm_weight_gradients
from pyralis.ops._norm_trained import ONE_PASS_FEATURES, norm_backward_trained
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
)


class LayerNormOutput(NamedTuple):
    y: Tensor  # [T, N]
    h: Tensor  # [T, N]: x + residual, or x itself without one
    mean: Tensor  # [T] float32
    rstd: Tensor  # [T] float32


def supported(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features, the kernels hold at most {MAX_FEATURES} in registers"
    return unsupported_tensors(x, weight, *others)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """y of the equations above without a residual; weights in another dtype than x's are cast to it."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def reference_backward(dy: Tensor, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """(dh [T, N], dweight [N], dbias [N]) in float32: dh = rstd * (g - mean(g) - n * mean(g * n)), g = dy * weight."""
    dtype = at_least_float32(h.dtype)
    dy = dy.to(dtype)
    n = (h.to(dtype) - mean[:, None]) * rstd[:, None]
    g = dy * weight.to(dtype)
    dh = rstd[:, None] * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dh, (dy * n).sum(0), dy.sum(0)


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    h_out: Tensor | None = None,
) -> LayerNormOutput:
    """Normalise rows. No autograd; writes into the buffers given and allocates those that are not.

    x, residual: [T, N], any row stride. out: [T, N] of any row stride and float dtype (default: h's), or [T, N + P],
    whose P last columns are filled with zeros (room for LoRA's). h_out: [T, N], may be x or residual itself; by
    default in the promoted dtype of the two.
    """
    T, N = x.shape
    h = x
    if residual is not None:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        h = torch.empty((T, N), dtype=dtype, device=x.device) if h_out is None else h_out
    out = torch.empty((T, N), dtype=h.dtype, device=x.device) if out is None else out
    mean, rstd = torch.empty((2, T), dtype=at_least_float32(h.dtype), device=x.device)
    y = out[:, :N]
    if supported(x, weight, bias, residual, out, h) is not None:
        if residual is not None:
            h.copy_(x + residual)
        wide = h.to(mean.dtype)
        mean.copy_(wide.mean(-1))
        rstd.copy_(torch.rsqrt(wide.var(-1, correction=0) + eps))
        y.copy_(reference(h, weight, bias, eps))
        out[:, N:].zero_()
        return LayerNormOutput(y, h, mean, rstd)
    plan = RowLaunch.of(N)
    P = out.shape[1] - N
    launch(
        _forward_kernel, (cdiv(T, plan.rows),),
        x, residual, weight, bias, y, h if residual is not None else None, mean, rstd, T,
        x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0), h.stride(0), eps,
        device=x.device, num_warps=plan.num_warps,
        N=N, P=P, BLOCK_N=plan.block_n, BLOCK_P=next_power_of_2(P), ROWS=plan.rows,
    )  # fmt: skip
    return LayerNormOutput(y, h, mean, rstd)


def layer_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    out: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to h, [T, N]; with a residual it is the gradient of x and of residual alike.

    dy, residual_grad (what reaches h past the norm, added in the same pass): [T, N], any row stride. out: default
    [T, N] in h's dtype; may be dy, h or residual_grad itself. dweight, dbias: [N], overwritten; None for frozen ones.
    With either and more than 8192 features a second pass reads dy and h again (`norm_weight_gradients`).
    """
    T, N = h.shape
    dx = torch.empty((T, N), dtype=h.dtype, device=h.device) if out is None else out
    if supported(h, weight, dy, residual_grad, dx) is not None:
        grad, grad_weight, grad_bias = reference_backward(dy, h, weight, mean, rstd)
        dx.copy_(grad if residual_grad is None else grad + residual_grad)
        if dweight is not None:
            dweight.copy_(grad_weight)
        if dbias is not None:
            dbias.copy_(grad_bias)
        return dx
    if dweight is not None or dbias is not None:
        if N <= ONE_PASS_FEATURES:
            norm_backward_trained(dy, h, weight, mean, rstd, dx, residual_grad, None, dweight, dbias)
            return dx
        norm_weight_gradients(dy, h, mean, rstd, dweight, dbias)  # before dx, which may overwrite dy
    plan = RowLaunch.of(N)
    launch(
        _backward_kernel, (cdiv(T, plan.rows),),
        dy, h, weight, mean, rstd, residual_grad, dx, T,
        dy.stride(0), h.stride(0), 0 if residual_grad is None else residual_grad.stride(0), dx.stride(0),
        device=h.device, num_warps=plan.num_warps, N=N, BLOCK_N=plan.block_n, ROWS=plan.rows,
    )  # fmt: skip
    return dx


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x, residual, weight, bias, y, h_out, mean_out, rstd_out, T, x_stride, residual_stride, y_stride, h_stride, eps,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)
    mask = (row < T)[:, None] & (col < N)[None, :]
    h = tl.load(x + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        h += tl.load(residual + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        h = round_to(h, h_out.dtype.element_ty)
        store_as(h_out + row[:, None] * h_stride + col[None, :], h, mask)
    mean = tl.sum(h, 1) / N
    centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    tl.store(mean_out + row, mean, mask=row < T)
    tl.store(rstd_out + row, rstd, mask=row < T)
    out = centred * rstd[:, None] * w
    if bias is not None:
        out += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    store_as(y + row[:, None] * y_stride + col[None, :], out, mask)
    if P > 0:
        extra = tl.arange(0, BLOCK_P)
        zeros = tl.zeros([ROWS, BLOCK_P], tl.float32)
        mask_p = (row < T)[:, None] & (extra < P)[None, :]
        store_as(y + row[:, None] * y_stride + N + extra[None, :], zeros, mask_p)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    dy, h, weight, mean, rstd, residual_grad, dx, T, dy_stride, h_stride, residual_stride, dx_stride,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)
    mask = (row < T)[:, None] & (col < N)[None, :]
    g = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    n = tl.load(h + row[:, None] * h_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    m = tl.load(mean + row, mask=row < T, other=0.0)[:, None]
    s = tl.load(rstd + row, mask=row < T, other=0.0)[:, None]
    n = (n - m) * s  # what it is in masked columns meets g = 0
    g = g * w
    grad = g - n * (tl.sum(g * n, 1) / N)[:, None]
    grad = s * (grad - (tl.sum(g, 1) / N)[:, None])
    if residual_grad is not None:
        at = residual_grad + row[:, None] * residual_stride + col[None, :]
        grad += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    store_as(dx + row[:, None] * dx_stride + col[None, :], grad, mask)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, h, mean, rstd = layer_norm_forward(x.reshape(-1, x.shape[-1]), weight, bias, eps)
        ctx.save_for_backward(h, weight, bias, mean, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, mean, rstd = ctx.saved_tensors
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        dbias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        dx = layer_norm_backward(dy.reshape(h.shape), h, weight, mean, rstd, dweight=dweight, dbias=dbias)
        return dx.view(dy.shape), dweight, dbias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension of x [..., N], differentiable in x, weight [N] and bias [N]."""
    return _LayerNorm.apply(x, weight, bias, eps)
