"""Partial results of LoRA's kernels added up, in a fixed order."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from torch import Tensor

from pyralis.ops._triton import cdiv, launch, next_power_of_2, store_as, tl, triton

AT_ONCE = 8  # parts loaded together: one after another they would wait for memory each time


def sum_parts(partial: Tensor, out: Tensor, alpha: float, *, add: bool) -> None:
    """out [rows, columns] = alpha * (the sum of partial [parts, rows, columns]), or += it."""
    parts, rows, columns = partial.shape
    block = min(next_power_of_2(columns), 512)
    launch(
        _sum_kernel, (rows, cdiv(columns, block)), partial, out, rows, columns, out.stride(0), parts, alpha,
        device=partial.device, num_warps=max(block // 128, 1), BLOCK=block, AT_ONCE=AT_ONCE, ADD=add,
    )  # fmt: skip


@triton.jit
def sum_of(partial, parts, distance, at, inside, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """[BLOCK]: the sum of `parts` vectors that lie `distance` (int64) elements apart, of the elements `at`."""
    total = tl.zeros([AT_ONCE, BLOCK], tl.float32)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        mask = (part < parts)[:, None] & inside[None, :]
        total += tl.load(partial + part[:, None] * distance + at[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows", "parts"])
def _sum_kernel(
    partial, out, rows, columns, out_stride, parts, alpha, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    distance = rows.to(tl.int64) * columns
    total = sum_of(partial, parts, distance, row * columns + col, col < columns, BLOCK, AT_ONCE) * alpha
    at = out + row * out_stride + col
    if ADD:
        total += tl.load(at, mask=col < columns, other=0.0).to(tl.float32)
    store_as(at, total, col < columns)
