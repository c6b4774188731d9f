"""The backward of a norm whose weights are trained: the gradients of its input and of its weights in one pass.

A few programs an SM go over the rows, each loading its next rows while it works on these, and keep their sums for the
weights in registers; a second launch adds up the programs' sums. Rows wider than ONE_PASS_FEATURES leave no registers
for the sums: for them `norm_weight_gradients` reads dy and h a second time.

Shapes: T rows (tokens), N features, C programs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, gpu_of, launch, next_power_of_2, store_as, tl, triton, warps_for

ONE_PASS_FEATURES = 8192


@dataclass(frozen=True, slots=True)
class TrainedNormLaunch:
    """How rows of N features are dealt to programs that stay."""

    block_n: int  # columns of a tile, a power of two >= N
    rows: int  # rows of a tile
    num_warps: int
    ahead: bool  # a tile is loaded while the one before is worked on
    programs: int

    @classmethod
    def of(cls, tokens: int, features: int, sm_count: int) -> TrainedNormLaunch:
        """16 elements of six arrays a thread; 16 warps an SM, so that two rows of 4096 are loaded at any time.

        The widest rows spill so: they take 32 warps, and without the next row's loads half the registers.
        """
        block_n = next_power_of_2(features)
        rows = max(1, 2048 // block_n)
        ahead = block_n <= 4096
        num_warps = warps_for(block_n * rows, most=16) if ahead else 32
        return cls(block_n, rows, num_warps, ahead, min(cdiv(tokens, rows), sm_count * max(1, 16 // num_warps)))


def norm_backward_trained(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    residual_grad: Tensor | None,
    branch_out: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    unit_offset: bool = False,
) -> None:
    """dx [T, N] and, overwritten, those of dweight [N] and dbias [N] that are given; N <= ONE_PASS_FEATURES.

    The arguments are those of `layer_norm_backward`, or with mean None of `rms_norm_backward`. Two launches in a fixed
    order, so two runs on one GPU agree bit by bit; allocates a float32 workspace of [C, N] for each of the two.
    """
    T, N = h.shape
    assert N <= ONE_PASS_FEATURES, f"{N} features"
    plan = TrainedNormLaunch.of(T, N, gpu_of(h.device).sm_count)
    outputs = [out for out in (dweight, dbias) if out is not None]
    sums = torch.empty((len(outputs), plan.programs, N), dtype=torch.float32, device=h.device)
    launch(
        _backward_kernel, (plan.programs,),
        dy, h, weight, mean, rstd, residual_grad, dx, branch_out,
        None if dweight is None else sums[0], None if dbias is None else sums[-1], T,
        dy.stride(0), h.stride(0), 0 if residual_grad is None else residual_grad.stride(0), dx.stride(0),
        0 if branch_out is None else branch_out.stride(0),
        device=h.device, num_warps=plan.num_warps,
        N=N, BLOCK_N=plan.block_n, ROWS=plan.rows, AHEAD=plan.ahead, UNIT_OFFSET=unit_offset,
    )  # fmt: skip
    block_n = min(64, next_power_of_2(N))
    launch(
        _add_up_kernel, (cdiv(N, block_n), len(outputs)),
        sums, *outputs, *[None] * (2 - len(outputs)), plan.programs,
        device=h.device, num_warps=8, N=N, BLOCK_N=block_n, ROWS=64,
    )  # fmt: skip


@triton.jit
def _tile(x, row, col, stride, T, N: tl.constexpr):
    mask = (row < T)[:, None] & (col < N)[None, :]
    return tl.load(x + row[:, None] * stride + col[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    dy, h, weight, mean, rstd, residual_grad, dx, branch_out, dweight_sums, dbias_sums, T,
    dy_stride, h_stride, residual_stride, dx_stride, branch_stride,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_N)
    dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    db = tl.zeros([ROWS, BLOCK_N], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0) * ROWS
    row = program * ROWS + tl.arange(0, ROWS)
    if AHEAD:  # and the weight is held
        held = tl.load(weight + col, mask=col < N, other=0.0)
        next_dy = _tile(dy, row, col, dy_stride, T, N)
        next_h = _tile(h, row, col, h_stride, T, N)
    for _ in tl.range(program * ROWS, T, step):
        if AHEAD:
            w = held.to(tl.float32)[None, :]
            g = next_dy.to(tl.float32)
            n = next_h.to(tl.float32)
            next_dy = _tile(dy, row + step, col, dy_stride, T, N)  # dx may lie over dy, but not these rows of it
            next_h = _tile(h, row + step, col, h_stride, T, N)
        else:
            w = tl.load(weight + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
            g = _tile(dy, row, col, dy_stride, T, N).to(tl.float32)
            n = _tile(h, row, col, h_stride, T, N).to(tl.float32)
        mask = (row < T)[:, None] & (col < N)[None, :]
        s = tl.load(rstd + row, mask=row < T, other=0.0)[:, None]
        if mean is not None:
            n -= tl.load(mean + row, mask=row < T, other=0.0)[:, None]
        n *= s  # what it is in masked columns meets g = 0
        if dweight_sums is not None:
            dw += g * n
        if dbias_sums is not None:
            db += g
        g = g * (1.0 + w) if UNIT_OFFSET else g * w
        grad = g - n * (tl.sum(g * n, 1) / N)[:, None]
        if mean is not None:
            grad -= (tl.sum(g, 1) / N)[:, None]
        grad *= s
        if residual_grad is not None:
            grad += _tile(residual_grad, row, col, residual_stride, T, N).to(tl.float32)
        store_as(dx + row[:, None] * dx_stride + col[None, :], grad, mask)
        if branch_out is not None:
            store_as(branch_out + row[:, None] * branch_stride + col[None, :], grad, mask)
        row += step
    at = program * N + col
    if dweight_sums is not None:
        tl.store(dweight_sums + at, tl.sum(dw, 0), mask=col < N)
    if dbias_sums is not None:
        tl.store(dbias_sums + at, tl.sum(db, 0), mask=col < N)


@triton.jit(do_not_specialize=["programs"])
def _add_up_kernel(sums, first, second, programs, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    sums += which.to(tl.int64) * programs * N
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in tl.range(0, programs, ROWS):
        total += _tile(sums, start + tl.arange(0, ROWS), col, N, programs, N)
    if which == 0:
        store_as(first + col, tl.sum(total, 0), col < N)
    elif second is not None:
        store_as(second + col, tl.sum(total, 0), col < N)
