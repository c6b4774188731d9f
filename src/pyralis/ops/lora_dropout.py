"""LoRA's dropout inside its pass over x, each projection with its own mask (`dropout_mask.py`).

    xa_j   = alpha_j (keep_j * x) A_j^T                      alpha_j = s_j / (1 - p_j)
    dA_j   = alpha_j g_j^T (keep_j * x)                      g_j = dy_j B_j
    dx    += alpha_j keep_j * (g_j A_j)

Half precision from compute capability 8.0 on goes through the kernels with `tl.dot`: a program loads a tile of x or dx
once and draws the masks of up to three projections for it. Elsewhere x is copied with zeros and cuBLAS multiplies: an
[T, K] workspace, and three passes over memory for each projection. Both draw the same masks, bit for bit.

Shapes: T tokens, K features, r rank.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._triton import (
    INTERPRETED,
    cdiv,
    gpu_of,
    launch,
    next_power_of_2,
    store_as,
    tl,
    triton,
    unsupported_tensors,
)
from pyralis.ops.dropout_mask import keep_tile, masked
from pyralis.ops.gemm import gemm
from pyralis.ops.lora_group import Run

_INTERPRET = tl.constexpr(INTERPRETED)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program holds of x or dx at a time, and how it is compiled."""

    block_t: int
    block_k: int
    warps: int
    stages: int = 1  # tiles loaded ahead through shared memory cost more instructions than other programs' work hides


@dataclass(frozen=True, slots=True)
class DotLaunch:
    """Launches of the kernels with `tl.dot`, by rank. They are bound by the instructions that draw and apply masks.

    together: the most projections (of 3) that a program serves. resident: warps that their registers leave on an SM,
    for 1, 2 and 3 projections.
    """

    block_r: int
    together: int
    project: Tile
    grad_A: Tile
    grad_x: Tile
    resident: tuple[int, int, int]

    @classmethod
    def of(cls, rank: int) -> DotLaunch:
        block_r = max(16, next_power_of_2(rank))
        rows = 64 if block_r <= 128 else 32
        resident = (28, 16, 12) if block_r == 16 else (16, 12, 8) if block_r == 32 else (16, 16, 16)
        return cls(
            block_r, 3 if block_r <= 64 else 1,
            project=Tile(rows, 64, 8), grad_A=Tile(rows, 64, 4 if block_r <= 32 else 8),
            grad_x=Tile(32, 128 if block_r == 16 else 64, 4 if block_r <= 64 else 8), resident=resident,
        )  # fmt: skip

    def forward_splits(self, run: Run, T: int, K: int, sm_count: int) -> int:
        """Parts of K summed afterwards."""
        tile = self.project
        return self._splits(run, tile, cdiv(T, tile.block_t), cdiv(K, 4 * tile.block_k), sm_count)

    def backward_splits(self, run: Run, T: int, K: int, sm_count: int) -> int:
        """Parts of T summed afterwards."""
        tile = self.grad_A
        return self._splits(run, tile, cdiv(K, tile.block_k), cdiv(T, 4 * tile.block_t), sm_count)

    def _splits(self, run: Run, tile: Tile, programs: int, most: int, sm_count: int) -> int:
        """As many as the GPU runs at once: one program more would wait for a whole other to end."""
        slots = sm_count * self.resident[min(run.count, self.together) - 1] // tile.warps
        return max(min(slots // max(programs, 1), most, 16), 1)

    def passes(self, run: Run, stream: int) -> Iterator[tuple[int, slice, int]]:
        """(projections, their ranks among the run's, the stream of the first) of each launch."""
        for j in range(0, run.count, self.together):
            count = min(self.together, run.count - j)
            yield count, slice(j * run.like.rank, (j + count) * run.like.rank), stream + j


def supported(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels with `tl.dot` cannot take these tensors; None if they can."""
    if (reason := unsupported_tensors(x, *others)) is not None:
        return reason
    if x.dtype == torch.float32:
        return "float32: cuBLAS multiplies it faster, and exactly"
    if gpu_of(x.device).capability < (8, 0):
        return "tl.dot has no tensor cores below compute capability 8.0"
    return None


def project(
    run: Run, x: Tensor, A: Tensor, rng: Tensor, stream: int, out: Tensor, workspace: Tensor | None = None
) -> None:
    """xa of a run's projections: x [T, K], A [count * r, K] -> out [T, count * r], any row strides.

    workspace: [T, K] in x's dtype, written where the kernels with `tl.dot` do not run; allocated there if None.
    """
    T, K = x.shape
    rank, alpha, threshold = run.like.rank, run.like.scale * run.like.keep_scale, run.like.threshold
    if supported(x, A, out) is not None:
        kept = torch.empty((T, K), dtype=x.dtype, device=x.device) if workspace is None else workspace
        for j in range(run.count):
            part = slice(j * rank, (j + 1) * rank)
            masked(x, rng, stream + j, threshold, kept)
            out[:, part].addmm_(kept, A[part].t(), beta=0, alpha=alpha)
        return
    plan = DotLaunch.of(rank)
    tile, ranks = plan.project, run.count * rank
    splits = plan.forward_splits(run, T, K, gpu_of(x.device).sm_count)
    partial = None if splits == 1 else torch.empty((splits, T, ranks), dtype=torch.float32, device=x.device)
    span = cdiv(cdiv(K, tile.block_k), splits)
    for count, part, first in plan.passes(run, stream):
        launch(
            _project_kernel, (cdiv(T, tile.block_t), splits),
            x, A[part], rng, out[:, part], None if partial is None else partial[:, :, part],
            T, span, x.stride(0), A.stride(0), out.stride(0), first, threshold, alpha,
            device=x.device, num_warps=tile.warps, num_stages=tile.stages,
            K=K, RANK=rank, RANKS=ranks, COUNT=count, BLOCK_T=tile.block_t, BLOCK_K=tile.block_k, BLOCK_R=plan.block_r,
        )  # fmt: skip
    if partial is not None:
        _reduce(partial, out, alpha, add=False)


def project_backward(
    run: Run, g: Tensor, x: Tensor, A: Tensor, rng: Tensor, stream: int, dx: Tensor, dA: Tensor | None,
    *, accumulate: bool = False, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """Add a run's share to dx [T, K], and write (or with `accumulate` add to) dA [count * r, K] float32.

    g [T, count * r] holds dy_j B_j. The kernel's float32 partial sums of dA, [splits, count * r, K], are allocated.
    """
    T, K = x.shape
    rank, alpha, threshold = run.like.rank, run.like.scale * run.like.keep_scale, run.like.threshold
    if supported(x, g, A, dx) is not None:
        buffer = torch.empty((T, K), dtype=x.dtype, device=x.device) if workspace is None else workspace
        for j in range(run.count):
            part = slice(j * rank, (j + 1) * rank)
            if dA is not None:
                masked(x, rng, stream + j, threshold, buffer)
                gemm(dA[part], g[:, part].t(), buffer, alpha, accumulate)
            torch.mm(g[:, part], A[part], out=buffer)
            masked(buffer, rng, stream + j, threshold, dx, scale=alpha, add=True)
        return
    plan, partial = DotLaunch.of(rank), None
    if dA is not None:
        splits = plan.backward_splits(run, T, K, gpu_of(x.device).sm_count)
        partial = torch.empty((splits, run.count * rank, K), dtype=torch.float32, device=x.device)
    for count, part, first in plan.passes(run, stream):
        tile = plan.grad_x
        launch(
            _grad_x_kernel, (cdiv(K, tile.block_k), cdiv(T, tile.block_t)),
            g[:, part], A[part], rng, dx, T, g.stride(0), A.stride(0), dx.stride(0), first, threshold, alpha,
            device=x.device, num_warps=tile.warps, num_stages=tile.stages,
            K=K, RANK=rank, COUNT=count, BLOCK_T=tile.block_t, BLOCK_K=tile.block_k, BLOCK_R=plan.block_r,
        )  # fmt: skip
        if partial is not None:
            tile = plan.grad_A
            span = cdiv(cdiv(T, tile.block_t), len(partial)) * tile.block_t
            launch(
                _grad_A_kernel, (cdiv(K, tile.block_k), len(partial)),
                g[:, part], x, rng, partial[:, part], T, span, g.stride(0), x.stride(0), first, threshold,
                device=x.device, num_warps=tile.warps, num_stages=tile.stages,
                K=K, RANK=rank, RANKS=run.count * rank, COUNT=count,
                BLOCK_T=tile.block_t, BLOCK_K=tile.block_k, BLOCK_R=plan.block_r,
            )  # fmt: skip
    if partial is not None and dA is not None:
        _reduce(partial, dA, alpha, add=accumulate)


def _reduce(partial: Tensor, out: Tensor, alpha: float, *, add: bool) -> None:
    """out = alpha * (the sum over the first dimension, in order), or += it."""
    splits, rows, columns = partial.shape
    block = min(next_power_of_2(columns), 1024)
    launch(
        _reduce_kernel, (rows, cdiv(columns, block)), partial, out, rows, columns, out.stride(0), splits, alpha,
        device=partial.device, num_warps=max(block // 256, 1), BLOCK=block, ADD=add,
    )  # fmt: skip


@triton.jit
def _operand(x):
    """An operand of `tl.dot`: float32 in the interpreter, which has no bf16 arithmetic."""
    return x.to(tl.float32) if _INTERPRET else x


@triton.jit
def _g_tile(g, row, T, stride, first, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """g_j [rows, BLOCK_R], from column `first` on."""
    r = tl.arange(0, BLOCK_R)
    mask = (row < T)[:, None] & (r < RANK)[None, :]
    return _operand(tl.load(g + row[:, None] * stride + (first + r)[None, :], mask=mask, other=0.0))


@triton.jit
def _A_tile(A, col, stride, first, K: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """A_j [BLOCK_R, columns], from row `first` on."""
    r = tl.arange(0, BLOCK_R)
    mask = (r < RANK)[:, None] & (col < K)[None, :]
    return _operand(tl.load(A + (first + r)[:, None] * stride + col[None, :], mask=mask, other=0.0))


@triton.jit
def _kept(keep, value):
    return tl.where(keep, value, 0.0).to(value.dtype)


@triton.jit(do_not_specialize=["T", "span", "stream", "threshold"])
def _project_kernel(
    x, A, rng, out, partial, T, span, x_stride, A_stride, out_stride, stream, threshold, alpha,
    K: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`span`: blocks of K for each split; multiplied out here, so that the compiler sees aligned columns."""
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    seed, draw = tl.load(rng), tl.load(rng + 1)
    acc0 = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    acc1 = acc0
    acc2 = acc0
    for block in range(split * span, min(tl.cdiv(K, BLOCK_K), (split + 1) * span)):
        first = block * BLOCK_K
        col = first + tl.arange(0, BLOCK_K)
        inside = (row < T)[:, None] & (col < K)[None, :]
        value = _operand(tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0))
        keep = keep_tile(seed, draw, stream, threshold, row, first, BLOCK_T, BLOCK_K)
        acc0 += tl.dot(_kept(keep, value), tl.trans(_A_tile(A, col, A_stride, 0, K, RANK, BLOCK_R)))
        if COUNT > 1:
            keep = keep_tile(seed, draw, stream + 1, threshold, row, first, BLOCK_T, BLOCK_K)
            acc1 += tl.dot(_kept(keep, value), tl.trans(_A_tile(A, col, A_stride, RANK, K, RANK, BLOCK_R)))
        if COUNT > 2:
            keep = keep_tile(seed, draw, stream + 2, threshold, row, first, BLOCK_T, BLOCK_K)
            acc2 += tl.dot(_kept(keep, value), tl.trans(_A_tile(A, col, A_stride, 2 * RANK, K, RANK, BLOCK_R)))
    inside = (row < T)[:, None] & (r < RANK)[None, :]
    for j in tl.static_range(COUNT):
        acc = acc0 if j == 0 else (acc1 if j == 1 else acc2)
        column = (j * RANK + r)[None, :]
        if partial is None:
            store_as(out + row[:, None] * out_stride + column, acc * alpha, inside)
        else:
            tl.store(partial + (split * T.to(tl.int64) + row)[:, None] * RANKS + column, acc, mask=inside)


@triton.jit(do_not_specialize=["T", "stream", "threshold"])
def _grad_x_kernel(
    g, A, rng, dx, T, g_stride, A_stride, dx_stride, stream, threshold, alpha,
    K: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program is one tile of dx. Columns are the fastest axis of the grid: neighbours share rows of g.

    The 16 bits of dx are joined by the masks before either meets a product, or masks would be drawn in a layout that
    their words reach through shared memory only.
    """
    row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0) * BLOCK_K
    col = first + tl.arange(0, BLOCK_K)
    inside = (row < T)[:, None] & (col < K)[None, :]
    at = dx + row[:, None] * dx_stride + col[None, :]
    seed, draw = tl.load(rng), tl.load(rng + 1)
    packed = tl.load(at, mask=inside, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32)
    g0, a0 = _g_tile(g, row, T, g_stride, 0, RANK, BLOCK_R), _A_tile(A, col, A_stride, 0, K, RANK, BLOCK_R)
    g1 = _g_tile(g, row, T, g_stride, RANK, RANK, BLOCK_R) if COUNT > 1 else g0  # every load before the first barrier
    a1 = _A_tile(A, col, A_stride, RANK, K, RANK, BLOCK_R) if COUNT > 1 else a0
    g2 = _g_tile(g, row, T, g_stride, 2 * RANK, RANK, BLOCK_R) if COUNT > 2 else g0
    a2 = _A_tile(A, col, A_stride, 2 * RANK, K, RANK, BLOCK_R) if COUNT > 2 else a0
    for j in tl.static_range(COUNT):
        keep = keep_tile(seed, draw, stream + j, threshold, row, first, BLOCK_T, BLOCK_K)
        packed |= tl.where(keep, 0x10000 << j, 0).to(tl.uint32)
    total = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for j in tl.static_range(COUNT):
        product = tl.dot(g0 if j == 0 else (g1 if j == 1 else g2), a0 if j == 0 else (a1 if j == 1 else a2))
        total = tl.where(packed & (0x10000 << j) != 0, total + product, total)
    before = packed.to(tl.uint16).to(dx.dtype.element_ty, bitcast=True).to(tl.float32)
    store_as(at, before + total * alpha, inside)


@triton.jit(do_not_specialize=["T", "span", "stream", "threshold"])
def _grad_A_kernel(
    g, x, rng, partial, T, span, g_stride, x_stride, stream, threshold,
    K: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program sums over a span of tokens for a block of columns."""
    split = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_K
    col = first + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    seed, draw = tl.load(rng), tl.load(rng + 1)
    acc0 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    acc1 = acc0
    acc2 = acc0
    for start in range(split * span, min(T, (split + 1) * span), BLOCK_T):
        row = tl.arange(0, BLOCK_T).to(tl.int64) + start
        inside = (row < T)[:, None] & (col < K)[None, :]
        value = _operand(tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0))
        keep = keep_tile(seed, draw, stream, threshold, row, first, BLOCK_T, BLOCK_K)
        acc0 += tl.dot(tl.trans(_g_tile(g, row, T, g_stride, 0, RANK, BLOCK_R)), _kept(keep, value))
        if COUNT > 1:
            keep = keep_tile(seed, draw, stream + 1, threshold, row, first, BLOCK_T, BLOCK_K)
            acc1 += tl.dot(tl.trans(_g_tile(g, row, T, g_stride, RANK, RANK, BLOCK_R)), _kept(keep, value))
        if COUNT > 2:
            keep = keep_tile(seed, draw, stream + 2, threshold, row, first, BLOCK_T, BLOCK_K)
            acc2 += tl.dot(tl.trans(_g_tile(g, row, T, g_stride, 2 * RANK, RANK, BLOCK_R)), _kept(keep, value))
    for j in tl.static_range(COUNT):
        acc = acc0 if j == 0 else (acc1 if j == 1 else acc2)
        at = partial + (split * RANKS + j * RANK + r)[:, None].to(tl.int64) * K + col[None, :]
        tl.store(at, acc, mask=(r < RANK)[:, None] & (col < K)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def _reduce_kernel(partial, out, rows, columns, out_stride, splits, alpha, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * rows.to(tl.int64) + row) * columns + col, mask=col < columns, other=0.0)
    total *= alpha
    at = out + row * out_stride + col
    if ADD:
        total += tl.load(at, mask=col < columns, other=0.0).to(tl.float32)
    store_as(at, total, col < columns)
