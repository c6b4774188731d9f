"""The kernels of `lora_dropout.py`, with `tl.dot`.

A program serves up to three projections that share x: each has a mask of its own, drawn for the same tile. Shapes: T
tokens, K features, RANK of a projection, RANKS of the run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from pyralis.ops._triton import INTERPRETED, store_as, tl, triton
from pyralis.ops.dropout_mask import keep_tile

_INTERPRET = tl.constexpr(INTERPRETED)


@triton.jit
def operand(x):
    """An operand of `tl.dot`: float32 in the interpreter, which has no bf16 arithmetic."""
    return x.to(tl.float32) if _INTERPRET else x


@triton.jit
def columns_tile(t, row, T, stride, first, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """[rows, BLOCK_R] of narrow columns, from column `first` on."""
    r = tl.arange(0, BLOCK_R)
    mask = (row < T)[:, None] & (r < RANK)[None, :]
    return operand(tl.load(t + row[:, None] * stride + (first + r)[None, :], mask=mask, other=0.0))


@triton.jit
def A_tile(A, col, stride, first, K: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """A_j [BLOCK_R, columns], from row `first` on."""
    r = tl.arange(0, BLOCK_R)
    mask = (r < RANK)[:, None] & (col < K)[None, :]
    return operand(tl.load(A + (first + r)[:, None] * stride + col[None, :], mask=mask, other=0.0))


@triton.jit
def _kept(keep, value):
    return tl.where(keep, value, 0.0).to(value.dtype)


@triton.jit(do_not_specialize=["T", "span", "stream", "threshold"])
def project_kernel(
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
        value = operand(tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0))
        keep = keep_tile(seed, draw, stream, threshold, row, first, BLOCK_T, BLOCK_K)
        acc0 += tl.dot(_kept(keep, value), tl.trans(A_tile(A, col, A_stride, 0, K, RANK, BLOCK_R)))
        if COUNT > 1:
            keep = keep_tile(seed, draw, stream + 1, threshold, row, first, BLOCK_T, BLOCK_K)
            acc1 += tl.dot(_kept(keep, value), tl.trans(A_tile(A, col, A_stride, RANK, K, RANK, BLOCK_R)))
        if COUNT > 2:
            keep = keep_tile(seed, draw, stream + 2, threshold, row, first, BLOCK_T, BLOCK_K)
            acc2 += tl.dot(_kept(keep, value), tl.trans(A_tile(A, col, A_stride, 2 * RANK, K, RANK, BLOCK_R)))
    inside = (row < T)[:, None] & (r < RANK)[None, :]
    for j in tl.static_range(COUNT):
        acc = acc0 if j == 0 else (acc1 if j == 1 else acc2)
        column = (j * RANK + r)[None, :]
        if partial is None:
            store_as(out + row[:, None] * out_stride + column, acc * alpha, inside)
        else:
            tl.store(partial + (split * T.to(tl.int64) + row)[:, None] * RANKS + column, acc, mask=inside)


@triton.jit(do_not_specialize=["T", "span", "stream", "threshold"])
def grad_kernel(
    t, A, x, rng, dx, partial, T, span, t_stride, A_stride, x_stride, dx_stride, stream, threshold,
    K: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, COUNT: tl.constexpr, ADD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """For a block of columns and a span of tokens: dx = (or with ADD +=) the sum of keep_j * (t_j A_j), and the partial
    sum of dA_j = t_j^T (keep_j * x), unless `partial` is None.

    Masks and the 16 bits of x are joined in one word before either meets a product, or masks would be drawn in a layout
    that their words reach through shared memory only.
    """
    split = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_K
    col = first + tl.arange(0, BLOCK_K)
    seed, draw = tl.load(rng), tl.load(rng + 1)
    a0 = A_tile(A, col, A_stride, 0, K, RANK, BLOCK_R)
    a1 = A_tile(A, col, A_stride, RANK, K, RANK, BLOCK_R) if COUNT > 1 else a0
    a2 = A_tile(A, col, A_stride, 2 * RANK, K, RANK, BLOCK_R) if COUNT > 2 else a0
    acc0 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    acc1 = acc0
    acc2 = acc0
    for start in range(split * span, min(T, (split + 1) * span), BLOCK_T):
        row = tl.arange(0, BLOCK_T).to(tl.int64) + start
        inside = (row < T)[:, None] & (col < K)[None, :]
        if partial is None:
            packed = tl.zeros([BLOCK_T, BLOCK_K], tl.uint32)
        else:
            value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
            packed = value.to(tl.uint16, bitcast=True).to(tl.uint32)
        t0 = columns_tile(t, row, T, t_stride, 0, RANK, BLOCK_R)  # every load before the first barrier
        t1 = columns_tile(t, row, T, t_stride, RANK, RANK, BLOCK_R) if COUNT > 1 else t0
        t2 = columns_tile(t, row, T, t_stride, 2 * RANK, RANK, BLOCK_R) if COUNT > 2 else t0
        for j in tl.static_range(COUNT):
            keep = keep_tile(seed, draw, stream + j, threshold, row, first, BLOCK_T, BLOCK_K)
            packed |= tl.where(keep, 0x10000 << j, 0).to(tl.uint32)
        if partial is not None:
            value = operand(packed.to(tl.uint16).to(x.dtype.element_ty, bitcast=True))
            acc0 += tl.dot(tl.trans(t0), _kept(packed & 0x10000 != 0, value))
            if COUNT > 1:
                acc1 += tl.dot(tl.trans(t1), _kept(packed & 0x20000 != 0, value))
            if COUNT > 2:
                acc2 += tl.dot(tl.trans(t2), _kept(packed & 0x40000 != 0, value))
        total = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for j in tl.static_range(COUNT):
            product = tl.dot(t0 if j == 0 else (t1 if j == 1 else t2), a0 if j == 0 else (a1 if j == 1 else a2))
            total = tl.where(packed & (0x10000 << j) != 0, total + product, total)
        at = dx + row[:, None] * dx_stride + col[None, :]
        if ADD:
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        store_as(at, total, inside)
    if partial is not None:
        r = tl.arange(0, BLOCK_R)
        for j in tl.static_range(COUNT):
            acc = acc0 if j == 0 else (acc1 if j == 1 else acc2)
            at = partial + (split * RANKS + j * RANK + r)[:, None].to(tl.int64) * K + col[None, :]
            tl.store(at, acc, mask=(r < RANK)[:, None] & (col < K)[None, :])
