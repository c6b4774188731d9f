"""A factor for each output feature of a linear layer, as DoRA's magnitudes are, and the gradients of both.

    y  = ratio u + bias + residual              summed in float32, rounded once
    du = ratio dy
    dm = sum over tokens of dy u / norm         where ratio = m / norm

Each direction is one pass over memory. Shapes: T tokens, N features; rows of any stride.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, gpu_of, launch, next_power_of_2, store_as, tl, triton, unsupported_tensors

CHUNK_ELEMENTS = 1 << 24  # the reference makes dy u 64 MiB of float32 at a time


@dataclass(frozen=True, slots=True)
class ScaleLaunch:
    """block: columns of a program. Backward: `rows` at a time, of one of `chunks` of all tokens."""

    block: int
    rows: int
    chunks: int
    num_warps: int = 4

    @classmethod
    def of(cls, tokens: int, features: int, sm_count: int) -> ScaleLaunch:
        block = min(256, next_power_of_2(features))
        chunks = max(1, min(cdiv(tokens, 64), 8 * sm_count // cdiv(features, block)))
        return cls(block, 16, chunks)


def supported(u: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    return unsupported_tensors(u, *others)


def reference(u: Tensor, ratio: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """y of the equation above in ratio's dtype."""
    y = u * ratio
    for added in (bias, residual):
        y = y if added is None else y + added
    return y


def feature_scale(
    u: Tensor, ratio: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """y [T, N] of u [T, N] and ratio [N] float32, in u's dtype. No autograd; out may be u or residual itself."""
    T, N = u.shape
    y = torch.empty((T, N), dtype=u.dtype, device=u.device) if out is None else out
    if supported(u, ratio, bias, residual, y) is not None:
        return y.copy_(reference(u, ratio, bias=bias, residual=residual))
    block = min(1024, next_power_of_2(N))
    launch(
        _forward_kernel, (T, cdiv(N, block)), u, ratio, bias, residual, y,
        u.stride(0), 0 if residual is None else residual.stride(0), y.stride(0),
        device=u.device, num_warps=max(block // 256, 1), N=N, BLOCK=block,
    )  # fmt: skip
    return y


def feature_scale_backward(
    dy: Tensor, ratio: Tensor, u: Tensor | None = None, norm: Tensor | None = None, dmagnitude: Tensor | None = None,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """du [T, N]; out may be dy itself. dmagnitude [N] float32 is overwritten: of u [T, N] and norm [N]; None for
    magnitudes that are not trained."""
    T, N = dy.shape
    du = torch.empty((T, N), dtype=dy.dtype, device=dy.device) if out is None else out
    wanted = dmagnitude is not None
    assert not wanted or (u is not None and norm is not None), "the gradient of magnitudes is one of u and norm"
    u = u if wanted else None
    if supported(dy, ratio, u, du) is not None:
        if dmagnitude is not None and u is not None and norm is not None:
            dmagnitude.zero_()
            step = max(CHUNK_ELEMENTS // N, 1)
            for rows in (slice(first, first + step) for first in range(0, T, step)):
                dmagnitude.add_((dy[rows].to(dmagnitude.dtype) * u[rows]).sum(0))
            dmagnitude.div_(norm)
        return du.copy_(dy * ratio)
    plan = ScaleLaunch.of(T, N, gpu_of(dy.device).sm_count)
    partial = torch.empty((plan.chunks, N), dtype=torch.float32, device=dy.device) if wanted else None
    launch(
        _backward_kernel, (cdiv(N, plan.block), plan.chunks), dy, u, ratio, du, partial,
        T, cdiv(T, plan.chunks), dy.stride(0), 0 if u is None else u.stride(0), du.stride(0),
        device=dy.device, num_warps=plan.num_warps, N=N, BLOCK=plan.block, ROWS=plan.rows,
    )  # fmt: skip
    if partial is not None and norm is not None:
        torch.div(partial.sum(0), norm, out=dmagnitude)
    return du


@triton.jit
def _forward_kernel(
    u, ratio, bias, residual, y, u_stride, residual_stride, y_stride, N: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < N
    value = tl.load(u + row * u_stride + col, mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(ratio + col, mask=mask, other=0.0)
    if bias is not None:
        value += tl.load(bias + col, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + col, mask=mask, other=0.0).to(tl.float32)
    store_as(y + row * y_stride + col, value, mask)


@triton.jit(do_not_specialize=["T", "chunk_rows"])
def _backward_kernel(
    dy, u, ratio, du, partial, T, chunk_rows, dy_stride, u_stride, du_stride,
    N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(ratio + col, mask=col < N, other=0.0)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, T)
    for start in tl.range(first, last, ROWS):
        row = tl.arange(0, ROWS).to(tl.int64) + start
        mask = (row < last)[:, None] & (col < N)[None, :]
        g = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if partial is not None:
            total += g * tl.load(u + row[:, None] * u_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        store_as(du + row[:, None] * du_stride + col[None, :], g * factor, mask)
    if partial is not None:
        tl.store(partial + chunk * N + col, tl.sum(total, 0), mask=col < N)
