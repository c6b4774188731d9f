"""RMS norm, with the residual addition before it and its gradient in the same passes.

    h = x + residual                        rounded to h's dtype
    n = h / sqrt(mean(h^2) + eps)           float32
    y = round(n) * weight                   Llama: n is rounded to h's dtype first
    y = n * (1 + weight)                    Gemma (`unit_offset`): rounded once, at the end

Shapes: T rows (tokens), N features, P extra columns of a wide output row.
Source of the maths: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), equation 4.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class RMSNormOutput(NamedTuple):
    y: Tensor  # [T, N]
    h: Tensor  # [T, N]: x + residual, or x itself without one
    rstd: Tensor  # [T] float32: 1 / sqrt(mean(h^2) + eps)


def supported(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features, the kernels hold at most {MAX_FEATURES} in registers"
    return unsupported_tensors(x, weight, *others)


def reference(
    x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """y of the equations above without a residual, as stock transformers rounds; float64 in, float64 out.

    dtype: what Gemma's rounds to at the end; None: x's.
    """
    n = x.to(at_least_float32(x.dtype))
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (n * (1 + weight.to(n.dtype))).to(dtype or x.dtype)
    return weight * n.to(x.dtype)


def reference_backward(
    dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """(dh [T, N], dweight [N]) in float32: dh = rstd * (g - n * mean(g * n)) with g = dy * weight, n = h * rstd."""
    dtype = at_least_float32(h.dtype)
    dy, scale = dy.to(dtype), weight.to(dtype) + unit_offset
    n = h.to(dtype) * rstd[:, None]
    g = dy * scale
    return rstd[:, None] * (g - n * (g * n).mean(-1, keepdim=True)), (dy * n).sum(0)


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    out: Tensor | None = None,
    h_out: Tensor | None = None,
    rstd_out: Tensor | None = None,
) -> RMSNormOutput:
    """Normalise rows. No autograd; writes into the buffers given and allocates those that are not.

    x, residual: [T, N], any row stride. out: [T, N] of any row stride and float dtype, or [T, N + P], whose P last
    columns are filled with zeros (room for LoRA's); by default [T, N] in the dtype stock would return. h_out: [T, N],
    may be x or residual itself; by default in the promoted dtype of the two. rstd_out: [T] float32, contiguous.
    """
    T, N = x.shape
    if residual is None:
        h = x
    elif h_out is None:
        h = torch.empty((T, N), dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    else:
        h = h_out
    if out is None:
        dtype = h.dtype if unit_offset else torch.promote_types(h.dtype, weight.dtype)
        out = torch.empty((T, N), dtype=dtype, device=x.device)
    rstd = torch.empty(T, dtype=at_least_float32(h.dtype), device=x.device) if rstd_out is None else rstd_out
    y = out[:, :N]
    if supported(x, weight, residual, out, h) is not None:
        if residual is not None:
            h.copy_(x + residual)
        wide = h.to(at_least_float32(h.dtype))
        rstd.copy_(torch.rsqrt(wide.square().mean(-1) + eps))
        y.copy_(reference(h, weight, eps, unit_offset=unit_offset, dtype=y.dtype))
        out[:, N:].zero_()
        return RMSNormOutput(y, h, rstd)
    plan = RowLaunch.of(N)
    P = out.shape[1] - N
    launch(
        _forward_kernel, (cdiv(T, plan.rows),),
        x, residual, weight, y, h if residual is not None else None, rstd, T,
        x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0), h.stride(0), eps,
        device=x.device, num_warps=plan.num_warps,
        N=N, P=P, BLOCK_N=plan.block_n, BLOCK_P=next_power_of_2(P), ROWS=plan.rows, UNIT_OFFSET=unit_offset,
    )  # fmt: skip
    return RMSNormOutput(y, h, rstd)


def rms_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    unit_offset: bool = False,
    residual_grad: Tensor | None = None,
    out: Tensor | None = None,
    branch_out: Tensor | None = None,
    dweight: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to h, [T, N]; with a residual it is the gradient of x and of residual alike.

    dy, residual_grad (what reaches h past the norm, added in the same pass): [T, N], any row stride. out: default
    [T, N] in h's dtype; may be dy, h or residual_grad itself. branch_out: the same gradient once more, in its own dtype
    (the half-precision branch of a float32 residual stream). dweight: [N], overwritten; None for a frozen weight.
    With dweight and more than 8192 features a second pass reads dy and h again (`norm_weight_gradients`).
    """
    T, N = h.shape
    dx = torch.empty((T, N), dtype=h.dtype, device=h.device) if out is None else out
    if supported(h, weight, dy, residual_grad, dx, branch_out) is not None:
        grad, grad_weight = reference_backward(dy, h, weight, rstd, unit_offset=unit_offset)
        if residual_grad is not None:
            grad += residual_grad
        dx.copy_(grad)
        if branch_out is not None:
            branch_out.copy_(grad)
        if dweight is not None:
            dweight.copy_(grad_weight)
        return dx
    if dweight is not None:
        if N <= ONE_PASS_FEATURES:
            norm_backward_trained(dy, h, weight, None, rstd, dx, residual_grad, branch_out, dweight, None, unit_offset)
            return dx
        norm_weight_gradients(dy, h, None, rstd, dweight, None)  # before dx, which may overwrite dy
    plan = RowLaunch.of(N)
    launch(
        _backward_kernel, (cdiv(T, plan.rows),),
        dy, h, weight, rstd, residual_grad, dx, branch_out, T,
        dy.stride(0), h.stride(0), 0 if residual_grad is None else residual_grad.stride(0), dx.stride(0),
        0 if branch_out is None else branch_out.stride(0),
        device=h.device, num_warps=plan.num_warps,
        N=N, BLOCK_N=plan.block_n, ROWS=plan.rows, UNIT_OFFSET=unit_offset,
    )  # fmt: skip
    return dx


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x, residual, weight, y, h_out, rstd_out, T, x_stride, residual_stride, y_stride, h_stride, eps,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)
    mask = (row < T)[:, None] & (col < N)[None, :]
    h = tl.load(x + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty if residual is None else h_out.dtype.element_ty
    if residual is not None:
        h += tl.load(residual + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        h = round_to(h, dtype)
        store_as(h_out + row[:, None] * h_stride + col[None, :], h, mask)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / N + eps)
    tl.store(rstd_out + row, rstd, mask=row < T)
    n = h * rstd[:, None]
    out = n * (1.0 + w) if UNIT_OFFSET else round_to(n, dtype) * w
    store_as(y + row[:, None] * y_stride + col[None, :], out, mask)
    if P > 0:
        extra = tl.arange(0, BLOCK_P)
        zeros = tl.zeros([ROWS, BLOCK_P], tl.float32)
        mask_p = (row < T)[:, None] & (extra < P)[None, :]
        store_as(y + row[:, None] * y_stride + N + extra[None, :], zeros, mask_p)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    dy, h, weight, rstd, residual_grad, dx, branch_out, T,
    dy_stride, h_stride, residual_stride, dx_stride, branch_stride,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)
    mask = (row < T)[:, None] & (col < N)[None, :]
    g = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    n = tl.load(h + row[:, None] * h_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    s = tl.load(rstd + row, mask=row < T, other=0.0)[:, None]
    n = n * s
    g = g * (1.0 + w) if UNIT_OFFSET else g * w
    grad = s * (g - n * (tl.sum(g * n, 1) / N)[:, None])
    if residual_grad is not None:
        at = residual_grad + row[:, None] * residual_stride + col[None, :]
        grad += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    store_as(dx + row[:, None] * dx_stride + col[None, :], grad, mask)
    if branch_out is not None:
        store_as(branch_out + row[:, None] * branch_stride + col[None, :], grad, mask)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool
    ) -> tuple[Tensor, Tensor] | Tensor:
        rows = x.reshape(-1, x.shape[-1])
        r = None if residual is None else residual.reshape(rows.shape)
        y, h, rstd = rms_norm_forward(rows, weight, eps, residual=r, unit_offset=unit_offset)
        ctx.save_for_backward(h, weight, rstd)
        ctx.unit_offset, ctx.dtypes = unit_offset, (x.dtype, None if residual is None else residual.dtype)
        return y.view(x.shape) if residual is None else (y.view(x.shape), h.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        dx = rms_norm_backward(
            dy.reshape(h.shape), h, weight, rstd, unit_offset=ctx.unit_offset,
            residual_grad=None if dh is None else dh.reshape(h.shape), dweight=dweight,
        ).view(dy.shape)  # fmt: skip
        x_dtype, residual_dtype = ctx.dtypes
        return dx.to(x_dtype), None if residual_dtype is None else dx.to(residual_dtype), dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """RMS norm over the last dimension of x [..., N], differentiable in x and weight [N]."""
    return _RMSNorm.apply(x, None, weight, eps, unit_offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) with h = x + residual, both [..., N]; differentiable in x, residual and weight [N]."""
    return _RMSNorm.apply(x, residual, weight, eps, unit_offset)
