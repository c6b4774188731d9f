"""What a LoRA backward reads of dy: t = dy B and dB = dy^T xa.

    t_j  = alpha_j dy_j B_j                       alpha_j = s_j, with dropout s_j / (1 - p_j)
    dB_j = dy_j^T xa_j                            xa = s x A^T of the forward

At small ranks one kernel yields both, and a wide copy of dy where that is wanted, from one pass over dy; two products
would read it twice, which for gate and up together is 78 us more of an H100 at T = 4096. A program holds dB of a strip
of features while it goes over a span of tokens; the parts of t that strips yield, and those of dB that spans do, are
added up by a second launch, in order. A projection's features only meet its own columns: no zeros are multiplied.

Shapes: T tokens, N features of all projections, P columns, R ranks of all.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pyralis.ops._triton import Gpu, cdiv, gpu_of, launch, store_as, tl, triton
from pyralis.ops.copy_rows import copy_rows
from pyralis.ops.gemm import gemm
from pyralis.ops.lora_dropout_kernels import columns_tile, operand
from pyralis.ops.lora_group import LoraGroup, Run
from pyralis.ops.lora_sums import AT_ONCE, sum_of
from pyralis.ops.lora_tiles import TOGETHER, DotLaunch, Tile, reads_dy_once, span_of, supported

SUM_BLOCK = 256
Tensors = Sequence[Tensor | None]


def grad_B(
    group: LoraGroup, dy: Tensor, B: Tensors, xa: Tensor, t: Tensor, dB: Tensors,
    *, dropout: bool, accumulate: bool = False, copy: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill t [T, P] (zeros after R), write or add to dB_j [N_j, r_j] float32 where it is not None; `copy` [T, N] = dy.

    dy [T, N], B_j [N_j, r_j], xa [T, R or P]; of any row stride. dropout: whether it is on, where a projection has any.
    The kernel's partial sums are allocated: float32, an eighth of dy's bytes up to rank 16, a quarter at rank 32.
    """
    parts = _parts(group, gpu_of(dy.device))
    fused = [_fuses(part, dy, B, xa, t, dB) for part in parts]
    if copy is not None and not (fused[0] and len(group.projections) == 1):
        copy_rows(copy, dy)
        copy = None
    for part, together in zip(parts, fused):
        alpha = part.run.alpha if dropout else part.run.like.scale
        if together:
            _both(group, part, dy, B, xa, t, dB, alpha, accumulate, copy)
            continue
        for j in part.members:
            rows, columns, b = group.rows[j], group.columns[j], _given(B, j)
            t[:, columns].addmm_(dy[:, rows], b, beta=0, alpha=alpha)
            if dB and (out := dB[j]) is not None:
                gemm(out, dy[:, rows].t(), xa[:, columns], 1.0, accumulate)
    if t.shape[1] > group.rank and not fused[-1]:
        t[:, group.rank :].zero_()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Adapters that one launch serves, and how their features are cut into strips."""

    run: Run
    members: tuple[int, ...]  # projections
    three: tuple[int, ...]  # the same for the kernel's arguments: what is not there is not read
    sizes: tuple[int, ...]  # features of each
    strips: tuple[int, ...]
    bounds: tuple[int, ...]  # where the three begin among dy's features, then where they end
    tile: Tile
    block_r: int

    @classmethod
    def of(cls, group: LoraGroup, run: Run, tile: Tile) -> Part:
        """run: at most `TOGETHER` adapters of the group."""
        members = group.adapted[run.first : run.first + run.count]
        three = tuple(members[min(i, len(members) - 1)] for i in range(TOGETHER))
        sizes = tuple(group.projections[j].out_features for j in members)
        bounds = (*(group.rows[j].start for j in three), *(group.rows[j].stop for j in three))
        strips = tuple(cdiv(n, tile.columns) for n in sizes)
        return cls(run, members, three, sizes, strips, bounds, tile, DotLaunch.of(run.like.rank).block_r)


@lru_cache
def _parts(group: LoraGroup, gpu: Gpu) -> tuple[Part, ...]:
    runs = [whole.part(i, TOGETHER) for whole in group.runs for i in range(0, whole.count, TOGETHER)]
    return tuple(Part.of(group, run, DotLaunch.of(run.like.rank).grad_B_on(gpu)) for run in runs)


def _fuses(part: Part, dy: Tensor, B: Tensors, xa: Tensor, t: Tensor, dB: Tensors) -> bool:
    if not reads_dy_once(part.run.like.rank) or not dB:
        return False
    stride = _given(B, part.members[0]).stride()
    for j in part.members:
        out = dB[j]
        if out is None or out.dtype != torch.float32 or not out.is_contiguous() or _given(B, j).stride() != stride:
            return False
    return supported(dy, *(B[j] for j in part.members), xa, t) is None


def _both(
    group: LoraGroup, part: Part, dy: Tensor, B: Tensors, xa: Tensor, t: Tensor, dB: Tensors, alpha: float,
    accumulate: bool, copy: Tensor | None,
) -> None:  # fmt: skip
    run, three, tile = part.run, part.three, part.tile
    rank, T, device = run.like.rank, dy.shape[0], dy.device
    count, features = sum(part.strips), sum(part.sizes)
    splits = tile.splits(count, cdiv(T, 4 * tile.block_t), 1, gpu_of(device).sm_count)
    t_parts = torch.empty((count, T, rank), dtype=torch.float32, device=device)
    dB_parts = torch.empty((splits, features, rank), dtype=torch.float32, device=device)
    launch(
        _grad_B_kernel, (count, splits),
        dy, *(B[j] for j in three), xa[:, run.columns], copy, t_parts, dB_parts,
        T, span_of(T, tile.block_t, splits) * tile.block_t, part.strips[0], sum(part.strips[:2]), features,
        *part.bounds, dy.stride(0), _given(B, three[0]).stride(0), xa.stride(0), 0 if copy is None else copy.stride(0),
        device=device, num_warps=tile.warps, num_stages=tile.stages,
        RANK=rank, COUNT=len(part.members), BLOCK_T=tile.block_t, BLOCK_N=tile.columns, BLOCK_R=part.block_r,
    )  # fmt: skip
    add_up(group, part, t_parts, dB_parts, t, dB, alpha, accumulate)


def add_up(
    group: LoraGroup, part: Part, t_parts: Tensor, dB_parts: Tensor, t: Tensor, dB: Tensors, alpha: float,
    accumulate: bool,
) -> None:  # fmt: skip
    """t's columns of the part, alpha times the sum of t_parts [strips, T, r] over each projection's own, zeros after
    the last; dB_j = or += the sum of dB_parts [splits, features, r] over splits. All float32 but t."""
    run, members, three, sizes, strips = part.run, part.members, part.three, part.sizes, part.strips
    rank, T = run.like.rank, t.shape[0]
    pad = t.shape[1] - group.rank if members[-1] == group.adapted[-1] else 0
    t_tiles, most = cdiv(T * rank, SUM_BLOCK), cdiv(max(sizes) * rank, SUM_BLOCK)
    launch(
        _sum_both_kernel, (max(t_tiles + most, cdiv(T * pad, SUM_BLOCK)), len(members) + (pad > 0)),
        t_parts, dB_parts, t[:, run.column :], *(dB[j] for j in three),
        T, t_tiles, len(dB_parts), strips[0], sum(strips[:2]), sum(strips), sum(sizes), *part.bounds, t.stride(0),
        alpha, device=t.device, num_warps=4,
        RANK=rank, COUNT=len(members), PAD=pad, ADD=accumulate, BLOCK=SUM_BLOCK, AT_ONCE=AT_ONCE,
    )  # fmt: skip


def _given(B: Tensors, j: int) -> Tensor:
    matrix = B[j]
    assert matrix is not None, f"projection {j} has a rank but no B"
    return matrix


@triton.jit(do_not_specialize=["T", "span", "strips1", "strips2"])
def _grad_B_kernel(
    dy, B0, B1, B2, xa, copy, t_parts, dB_parts,
    T, span, strips1, strips2, features, start0, start1, start2, end0, end1, end2,
    dy_stride, B_stride, xa_stride, copy_stride,
    RANK: tl.constexpr, COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A strip of one projection's features, and a span of tokens. strips1, strips2: the first strips of projections 1
    and 2. start_j, end_j: the projections' features among dy's. features: of all, the rows of dB's parts."""
    strip, split = tl.program_id(0), tl.program_id(1)
    B, start, end = B0, start0, end0
    first, column, before = strip, 0, 0  # strips before this one in its projection; xa's column; rows of dB's parts
    if COUNT > 1:
        second = strip >= strips1
        B, start, end = tl.where(second, B1, B0), tl.where(second, start1, start0), tl.where(second, end1, end0)
        first = tl.where(second, strip - strips1, strip)
        column, before = tl.where(second, RANK, 0), tl.where(second, end0 - start0, 0)
    if COUNT > 2:
        third = strip >= strips2
        B, start, end = tl.where(third, B2, B), tl.where(third, start2, start), tl.where(third, end2, end)
        first = tl.where(third, strip - strips2, first)
        column = tl.where(third, 2 * RANK, column)
        before = tl.where(third, end0 - start0 + end1 - start1, before)
    feature = first * BLOCK_N + tl.arange(0, BLOCK_N)
    present = feature < end - start
    col = start + feature
    r = tl.arange(0, BLOCK_R)
    mask = present[:, None] & (r < RANK)[None, :]
    b = operand(tl.load(B + feature[:, None].to(tl.int64) * B_stride + r[None, :], mask=mask, other=0.0))
    dB = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for token in range(split * span, min(T, (split + 1) * span), BLOCK_T):
        row = tl.arange(0, BLOCK_T).to(tl.int64) + token
        inside = (row < T)[:, None] & present[None, :]
        d = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0)
        x = columns_tile(xa, row, T, xa_stride, column, RANK, BLOCK_R)
        if copy is not None:
            tl.store(copy + row[:, None] * copy_stride + col[None, :], d, mask=inside)
        dB += tl.dot(tl.trans(operand(d)), x)
        t = tl.dot(operand(d), b)
        at = t_parts + (strip * T.to(tl.int64) + row)[:, None] * RANK + r[None, :]
        tl.store(at, t, mask=(row < T)[:, None] & (r < RANK)[None, :])
    at = dB_parts + (split * features.to(tl.int64) + before + feature)[:, None] * RANK + r[None, :]
    tl.store(at, dB, mask=mask)


@triton.jit(do_not_specialize=["T", "t_tiles", "splits", "strips1", "strips2", "strips"])
def _sum_both_kernel(
    t_parts, dB_parts, t, dB0, dB1, dB2, T, t_tiles, splits, strips1, strips2, strips,
    features, start0, start1, start2, end0, end1, end2, t_stride, alpha,
    RANK: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A second axis of the grid for projections, and one more for the PAD zeros after t's columns of the last."""
    tile, j = tl.program_id(0), tl.program_id(1)
    dB, size, first, last, before = dB0, end0 - start0, 0, strips, 0
    if COUNT > 1:
        dB, size = tl.where(j == 1, dB1, dB), tl.where(j == 1, end1 - start1, size)
        first, last = tl.where(j == 1, strips1, first), tl.where(j == 0, strips1, last)
        before = tl.where(j == 1, end0 - start0, before)
    if COUNT > 2:
        dB, size = tl.where(j == 2, dB2, dB), tl.where(j == 2, end2 - start2, size)
        first, last = tl.where(j == 2, strips2, first), tl.where(j == 1, strips2, last)
        before = tl.where(j == 2, end0 - start0 + end1 - start1, before)
    if j == COUNT:
        _zeros(tile, t + COUNT * RANK, T, t_stride, PAD, BLOCK)
    elif tile < t_tiles:
        element = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = element < T.to(tl.int64) * RANK
        distance = T.to(tl.int64) * RANK
        total = sum_of(t_parts + first * distance, last - first, distance, element, inside, BLOCK, AT_ONCE)
        store_as(t + element // RANK * t_stride + j * RANK + element % RANK, total * alpha, inside)
    else:
        element = (tile - t_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = element < size * RANK
        distance = features.to(tl.int64) * RANK
        total = sum_of(dB_parts + before * RANK, splits, distance, element, inside, BLOCK, AT_ONCE)
        if ADD:
            total += tl.load(dB + element, mask=inside, other=0.0)
        tl.store(dB + element, total, mask=inside)


@triton.jit
def _zeros(tile, at, T, stride, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """[T, PAD] zeros from `at` on."""
    if PAD > 0:
        element = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        store_as(at + element // PAD * stride + element % PAD, tl.zeros([BLOCK], tl.float32), element < T * PAD)
