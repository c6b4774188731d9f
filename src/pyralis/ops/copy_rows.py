"""Rows copied to rows of another stride: what a kernel that takes no `out` has made, into rows with room for LoRA.

    out[t] = x[t]

torch's `copy_` moves half-precision elements one by one there: 43.7 us on an H100 for [4096, 4096] into rows of 4160,
which memory would allow in 22. Shapes: T tokens, N features; rows of any stride.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, launch, next_power_of_2, tl, triton, unsupported_tensors

NUM_WARPS = 8
BYTES = 32 * 32 * NUM_WARPS  # a program's: 32 of a thread. An H100 holds all programs of 1024 x 4096 bfloat16 at once


@dataclass(frozen=True, slots=True)
class CopyLaunch:
    """A program copies `block` columns of `rows` rows."""

    rows: int
    block: int

    @classmethod
    @cache
    def of(cls, features: int, itemsize: int, aligned: bool) -> CopyLaunch:
        """aligned: whether features and strides are multiples of 16, so that Triton moves 16 bytes at a time. Else each
        element has an address of its own: of sixteen a thread some would not fit into registers."""
        elements = (BYTES if aligned else BYTES // 2) // itemsize
        block = min(next_power_of_2(features), elements)
        return cls(elements // block, block)


def supported(out: Tensor, x: Tensor) -> str | None:
    """Why the kernel cannot take these tensors; None if it can."""
    if out.dtype != x.dtype:
        return f"{x.dtype} into {out.dtype}"
    return unsupported_tensors(out, x)


def reference(out: Tensor, x: Tensor) -> Tensor:
    """The equation above."""
    return out.copy_(x)


def copy_rows(out: Tensor, x: Tensor) -> Tensor:
    """out [T, N], overwritten by x [T, N]. They share no memory. Nothing is allocated; no autograd."""
    assert out.dim() == 2, "out is [T, N]"
    assert out.shape == x.shape, "out and x have the same shape"
    if supported(out, x) is not None:
        return reference(out, x)
    (T, N), strides = x.shape, (out.stride(0), x.stride(0))
    plan = CopyLaunch.of(N, x.element_size(), not any(n % 16 for n in (N, *strides)))
    launch(
        _copy_kernel, (cdiv(T, plan.rows), cdiv(N, plan.block)), out, x, T, N, *strides,
        device=x.device, num_warps=NUM_WARPS, ROWS=plan.rows, BLOCK=plan.block,
    )  # fmt: skip
    return out


def contiguous_rows(x: Tensor) -> Tensor:
    """x [T, N] itself if its rows lie one behind the other, else a copy of which that is true. No autograd."""
    return x if x.is_contiguous() else copy_rows(torch.empty(x.shape, dtype=x.dtype, device=x.device), x)


@triton.jit(do_not_specialize=["T"])
def _copy_kernel(out, x, T, N, out_stride, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """N is an argument like the strides: where they are multiples of 16, a thread moves 16 bytes at a time."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < T) & (col < N)
    tl.store(out + row * out_stride + col, tl.load(x + row * x_stride + col, mask=mask), mask=mask)
