"""LoRA's dropout inside its pass over x, each projection with its own mask (`dropout_mask.py`).

    xa_j   = alpha_j (keep_j * x) A_j^T                      alpha_j = s_j / (1 - p_j)
    dA_j   = alpha_j g_j^T (keep_j * x)                      g_j = dy_j B_j
    dx    += alpha_j keep_j * (g_j A_j)

Half precision from compute capability 8.0 on goes through the kernels with `tl.dot`, in which x is read once (the
programs of several projections share its tiles in L2). Elsewhere x is copied with zeros and cuBLAS multiplies: an
[T, K] workspace, and three passes over memory for each projection. Both draw the same masks, bit for bit.

Shapes: T tokens, K features, r rank.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

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
class DotLaunch:
    """Tiles of the kernels with `tl.dot`, by rank."""

    block_t: int
    block_k: int
    block_r: int
    forward_warps: int
    num_stages: int
    backward_warps: int = 8  # two products and masks at once: 4 warps need 240 registers a thread

    @classmethod
    def of(cls, rank: int) -> DotLaunch:
        block_r = max(16, next_power_of_2(rank))
        small = block_r <= 64
        stages = 3 if block_r <= 128 else 2  # 3 take 66 KiB of shared memory, gfx942 has 64
        return cls(32 if small else 16, 128 if block_r <= 32 else 64, block_r, 4 if small else 8, stages)

    def forward_splits(self, run: Run, T: int, K: int, sm_count: int) -> int:
        """Parts of K summed afterwards, so that few tokens still fill the GPU twice."""
        programs = max(run.count * cdiv(T, self.block_t), 1)
        wanted = min(2 * sm_count // programs, cdiv(K, 4 * self.block_k), 8)
        return 1 << max(wanted.bit_length() - 1, 0)

    def backward_splits(self, T: int, K: int, sm_count: int) -> int:
        """Parts of T summed afterwards."""
        return max(min(cdiv(2 * sm_count, cdiv(K, self.block_k)), cdiv(T, 4 * self.block_t), 16), 1)


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
    rank, alpha = run.like.rank, run.like.scale * run.like.keep_scale
    if supported(x, A, out) is not None:
        kept = torch.empty((T, K), dtype=x.dtype, device=x.device) if workspace is None else workspace
        for j in range(run.count):
            part = slice(j * rank, (j + 1) * rank)
            masked(x, rng, stream + j, run.like.threshold, kept)
            out[:, part].addmm_(kept, A[part].t(), beta=0, alpha=alpha)
        return
    plan = DotLaunch.of(rank)
    splits = plan.forward_splits(run, T, K, gpu_of(x.device).sm_count)
    partial = None if splits == 1 else torch.empty((splits, T, run.count * rank), dtype=torch.float32, device=x.device)
    span = cdiv(cdiv(K, plan.block_k), splits)
    launch(
        _project_kernel, (run.count, cdiv(T, plan.block_t), splits),
        x, A, rng, out, partial, T, span, x.stride(0), A.stride(0), out.stride(0), stream, run.like.threshold, alpha,
        device=x.device, num_warps=plan.forward_warps, num_stages=plan.num_stages,
        K=K, RANK=rank, RANKS=run.count * rank, BLOCK_T=plan.block_t, BLOCK_K=plan.block_k, BLOCK_R=plan.block_r,
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
    rank, alpha = run.like.rank, run.like.scale * run.like.keep_scale
    if supported(x, g, A, dx) is not None:
        buffer = torch.empty((T, K), dtype=x.dtype, device=x.device) if workspace is None else workspace
        for j in range(run.count):
            part = slice(j * rank, (j + 1) * rank)
            if dA is not None:
                masked(x, rng, stream + j, run.like.threshold, buffer)
                gemm(dA[part], g[:, part].t(), buffer, alpha, accumulate)
            torch.mm(g[:, part], A[part], out=buffer)
            masked(buffer, rng, stream + j, run.like.threshold, dx, scale=alpha, add=True)
        return
    plan = DotLaunch.of(rank)
    splits = plan.backward_splits(T, K, gpu_of(x.device).sm_count)
    partial = None
    if dA is not None:
        partial = torch.empty((splits, run.count * rank, K), dtype=torch.float32, device=x.device)
    span = cdiv(cdiv(T, plan.block_t), splits) * plan.block_t
    launch(
        _backward_kernel, (cdiv(K, plan.block_k), splits),
        g, x, A, rng, dx, partial, T, span, g.stride(0), x.stride(0), A.stride(0), dx.stride(0),
        stream, run.like.threshold, alpha,
        device=x.device, num_warps=plan.backward_warps, num_stages=plan.num_stages,
        K=K, RANK=rank, COUNT=run.count, BLOCK_T=plan.block_t, BLOCK_K=plan.block_k, BLOCK_R=plan.block_r,
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


@triton.jit(do_not_specialize=["T", "span", "stream", "threshold"])
def _project_kernel(
    x, A, rng, out, partial, T, span, x_stride, A_stride, out_stride, stream, threshold, alpha,
    K: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first grid axis, the fastest, is the projection: those of one block of tokens find x in L2.

    `span`: blocks of K for each split; multiplied out here, so that the compiler sees aligned columns.
    """
    j, split = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    seed, draw = tl.load(rng), tl.load(rng + 1)
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for block in range(split * span, min(tl.cdiv(K, BLOCK_K), (split + 1) * span)):
        first = block * BLOCK_K
        col = first + tl.arange(0, BLOCK_K)
        inside = (row < T)[:, None] & (col < K)[None, :]
        value = _operand(tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0))
        at = A + (j * RANK + r)[None, :] * A_stride + col[:, None]
        a = _operand(tl.load(at, mask=(r < RANK)[None, :] & (col < K)[:, None], other=0.0))
        keep = keep_tile(seed, draw, stream + j, threshold, row, first, BLOCK_T, BLOCK_K)
        acc += tl.dot(tl.where(keep, value, 0.0).to(value.dtype), a)
    inside = (row < T)[:, None] & (r < RANK)[None, :]
    if partial is None:
        store_as(out + row[:, None] * out_stride + (j * RANK + r)[None, :], acc * alpha, inside)
    else:
        at = partial + (split * T.to(tl.int64) + row)[:, None] * RANKS + (j * RANK + r)[None, :]
        tl.store(at, acc, mask=inside)


@triton.jit(do_not_specialize=["T", "span", "stream", "threshold"])
def _backward_kernel(
    g, x, A, rng, dx, partial, T, span, g_stride, x_stride, A_stride, dx_stride, stream, threshold, alpha,
    K: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program owns a block of columns of dx in a span of tokens, and goes over it once for each projection."""
    split = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_K
    col = first + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    seed, draw = tl.load(rng), tl.load(rng + 1)
    for j in range(COUNT):
        factor = (r < RANK)[:, None] & (col < K)[None, :]
        a = _operand(tl.load(A + (j * RANK + r)[:, None] * A_stride + col[None, :], mask=factor, other=0.0))
        acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for start in range(split * span, min(T, (split + 1) * span), BLOCK_T):
            row = tl.arange(0, BLOCK_T).to(tl.int64) + start
            inside = (row < T)[:, None] & (col < K)[None, :]
            at = g + row[:, None] * g_stride + (j * RANK + r)[None, :]
            upstream = _operand(tl.load(at, mask=(row < T)[:, None] & (r < RANK)[None, :], other=0.0))
            keep = keep_tile(seed, draw, stream + j, threshold, row, first, BLOCK_T, BLOCK_K)
            if partial is not None:
                value = _operand(tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0))
                acc += tl.dot(tl.trans(upstream), tl.where(keep, value, 0.0).to(value.dtype))
            grad = tl.where(keep, tl.dot(upstream, a) * alpha, 0.0)
            at = dx + row[:, None] * dx_stride + col[None, :]
            store_as(at, tl.load(at, mask=inside, other=0.0).to(tl.float32) + grad, inside)
        if partial is not None:
            at = partial + (split * COUNT * RANK + j * RANK + r)[:, None].to(tl.int64) * K + col[None, :]
            tl.store(at, acc, mask=factor)
        tl.debug_barrier()  # the next projection reads what other threads of this program wrote to dx


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
