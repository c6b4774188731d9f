"""What the norms share: how rows are laid over programs, and the gradients of their weights.

Shapes: T rows (tokens), N features, C chunks of rows.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, gpu_of, launch, next_power_of_2, tl, triton, warps_for

MAX_FEATURES = 32768  # a row is held in registers


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """How rows of N features are laid over programs."""

    block_n: int  # columns of a tile, a power of two >= N
    rows: int  # rows of a tile
    num_warps: int

    @classmethod
    @cache
    def of(cls, features: int) -> RowLaunch:
        block_n = next_power_of_2(features)
        rows = max(1, 2048 // block_n)  # short rows share a program, so that each thread still has two loads in flight
        return cls(block_n, rows, warps_for(block_n * rows, most=32))


@dataclass(frozen=True, slots=True)
class ColumnLaunch:
    """How the rows summed into a weight's gradient are laid over programs: each sums one chunk for some columns."""

    block_n: int
    rows: int  # rows of a tile
    chunks: int
    num_warps: int = 4

    @classmethod
    def of(cls, tokens: int, features: int, sm_count: int) -> ColumnLaunch:
        block_n = min(128, next_power_of_2(features))
        rows = 4096 // 128
        chunks = max(1, min(cdiv(tokens, rows), 4 * sm_count // cdiv(features, block_n)))
        return cls(block_n, rows, chunks)


def norm_weight_gradients(
    dy: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor, dweight: Tensor | None, dbias: Tensor | None
) -> None:
    """dweight [N] = sum over rows of dy * (h - mean) * rstd, dbias [N] = sum of dy; overwrites those that are given.

    Two stages in a fixed order, so two runs agree bit by bit; allocates a float32 workspace of [C, N] for each.
    """
    T, N = h.shape
    plan = ColumnLaunch.of(T, N, gpu_of(h.device).sm_count)
    partials = [
        None if gradient is None else torch.empty((plan.chunks, N), dtype=torch.float32, device=h.device)
        for gradient in (dweight, dbias)
    ]
    launch(
        _weight_kernel, (cdiv(N, plan.block_n), plan.chunks),
        dy, h, mean, rstd, *partials, T, cdiv(T, plan.chunks), dy.stride(0), h.stride(0),
        device=h.device, num_warps=plan.num_warps, N=N, BLOCK_N=plan.block_n, ROWS=plan.rows,
    )  # fmt: skip
    for gradient, partial in zip((dweight, dbias), partials):
        if gradient is not None and partial is not None:
            gradient.copy_(partial.sum(0))


@triton.jit(do_not_specialize=["T", "chunk_rows"])
def _weight_kernel(
    dy, h, mean, rstd, dweight_partial, dbias_partial, T, chunk_rows, dy_stride, h_stride,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    db = tl.zeros([ROWS, BLOCK_N], tl.float32)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, T)
    for start in tl.range(first, last, ROWS):
        row = tl.arange(0, ROWS).to(tl.int64) + start
        mask = (row < last)[:, None] & (col < N)[None, :]
        g = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if dweight_partial is not None:
            x = tl.load(h + row[:, None] * h_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
            if mean is not None:
                x -= tl.load(mean + row, mask=row < last, other=0.0)[:, None]
            dw += g * x * tl.load(rstd + row, mask=row < last, other=0.0)[:, None]
        if dbias_partial is not None:
            db += g
    at = chunk * N + col
    if dweight_partial is not None:
        tl.store(dweight_partial + at, tl.sum(dw, 0), mask=col < N)
    if dbias_partial is not None:
        tl.store(dbias_partial + at, tl.sum(db, 0), mask=col < N)
