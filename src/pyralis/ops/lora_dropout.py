"""LoRA's dropout inside its passes over x and dx, each projection with its own mask (`dropout_mask.py`).

    xa_j = alpha_j (keep_j * x) A_j^T                     alpha_j = s_j / (1 - p_j)
    dA_j = t_j^T (keep_j * x)                             t_j = alpha_j dy_j B_j
    dx   = sum of keep_j * (t_j A_j)                      or += it

Half precision from compute capability 8.0 on goes through the kernels with `tl.dot` (`lora_dropout_kernels.py`): a
program draws the masks of up to three projections for a tile of x, and those of the backward serve dA and dx alike.
Elsewhere x is copied with zeros and cuBLAS multiplies: an [T, K] workspace, and three passes over memory for each
projection. Both draw the same masks, bit for bit.

Shapes: T tokens, K features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, gpu_of, launch
from pyralis.ops.dropout_mask import masked
from pyralis.ops.gemm import gemm
from pyralis.ops.lora_dropout_kernels import grad_kernel, project_kernel
from pyralis.ops.lora_group import Run
from pyralis.ops.lora_sums import sum_parts
from pyralis.ops.lora_tiles import DotLaunch, span_of, supported


def project(
    run: Run, x: Tensor, A: Tensor, rng: Tensor, stream: int, out: Tensor, workspace: Tensor | None = None
) -> None:
    """xa of a run's projections: x [T, K], A [count * r, K] -> out [T, count * r], any row strides.

    workspace: [T, K] in x's dtype, written where the kernels with `tl.dot` do not run; allocated there if None.
    """
    T, K = x.shape
    rank, alpha, threshold = run.like.rank, run.alpha, run.like.threshold
    if supported(x, A, out) is not None:
        kept = torch.empty((T, K), dtype=x.dtype, device=x.device) if workspace is None else workspace
        for j in range(run.count):
            part = slice(j * rank, (j + 1) * rank)
            masked(x, rng, stream + j, threshold, kept)
            out[:, part].addmm_(kept, A[part].t(), beta=0, alpha=alpha)
        return
    plan, ranks = DotLaunch.of(rank), run.count * rank
    splits = project_splits(plan, run, T, K, gpu_of(x.device).sm_count)
    partial = None if splits == 1 else torch.empty((splits, T, ranks), dtype=torch.float32, device=x.device)
    tile = plan.project
    for count, part, first in tile.passes(run, stream):
        launch(
            project_kernel, (cdiv(T, tile.block_t), splits),
            x, A[part], rng, out[:, part], None if partial is None else partial[:, :, part],
            T, span_of(K, tile.columns, splits), x.stride(0), A.stride(0), out.stride(0), first, threshold, alpha,
            device=x.device, num_warps=tile.warps, num_stages=tile.stages,
            K=K, RANK=rank, RANKS=ranks, COUNT=count, BLOCK_T=tile.block_t, BLOCK_K=tile.columns, BLOCK_R=plan.block_r,
        )  # fmt: skip
    if partial is not None:
        sum_parts(partial, out, alpha, add=False)


def project_splits(plan: DotLaunch, run: Run, T: int, K: int, sm_count: int) -> int:
    """Parts of K in the forward."""
    tile = plan.project
    most = cdiv(K, 4 * tile.columns)
    return tile.splits(cdiv(T, tile.block_t), most, run.count, sm_count)


def project_backward(
    run: Run, t: Tensor, x: Tensor, A: Tensor, rng: Tensor, stream: int, dx: Tensor, dA: Tensor | None,
    *, add_dx: bool = False, accumulate: bool = False, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """Write (or with `add_dx` add) a run's share of dx [T, K], and write (or with `accumulate` add to) dA
    [count * r, K] float32, unless that is None.

    t [T, count * r] holds alpha_j dy_j B_j. The kernel's float32 partial sums of dA, [splits, count * r, K], are
    allocated. workspace: as for `project`.
    """
    T, K = x.shape
    rank, threshold = run.like.rank, run.like.threshold
    if supported(x, t, A, dx) is not None:
        buffer = torch.empty((T, K), dtype=x.dtype, device=x.device) if workspace is None else workspace
        for j in range(run.count):
            part = slice(j * rank, (j + 1) * rank)
            if dA is not None:
                masked(x, rng, stream + j, threshold, buffer)
                gemm(dA[part], t[:, part].t(), buffer, 1.0, accumulate)
            torch.mm(t[:, part], A[part], out=buffer)
            masked(buffer, rng, stream + j, threshold, dx, add=add_dx or j > 0)
        return
    plan = DotLaunch.of(rank)
    tile, splits = plan.grad, grad_splits(plan, run, T, K, gpu_of(x.device).sm_count)
    partial = None
    if dA is not None:
        partial = torch.empty((splits, run.count * rank, K), dtype=torch.float32, device=x.device)
    for count, part, first in tile.passes(run, stream):
        launch(
            grad_kernel, (cdiv(K, tile.columns), splits),
            t[:, part], A[part], x, rng, dx, None if partial is None else partial[:, part],
            T, span_of(T, tile.block_t, splits) * tile.block_t,
            t.stride(0), A.stride(0), x.stride(0), dx.stride(0), first, threshold,
            device=x.device, num_warps=tile.warps, num_stages=tile.stages,
            K=K, RANK=rank, RANKS=run.count * rank, COUNT=count, ADD=add_dx or first > stream,
            BLOCK_T=tile.block_t, BLOCK_K=tile.columns, BLOCK_R=plan.block_r,
        )  # fmt: skip
    if partial is not None and dA is not None:
        sum_parts(partial, dA, 1.0, add=accumulate)


def grad_splits(plan: DotLaunch, run: Run, T: int, K: int, sm_count: int) -> int:
    """Parts of T in the backward."""
    tile = plan.grad
    most = cdiv(T, 4 * tile.block_t)
    return tile.splits(cdiv(K, tile.columns), most, run.count, sm_count)
