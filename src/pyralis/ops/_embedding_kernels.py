"""The kernels of embedding.py.

The gradient's sum over the tokens of a row is cut where a place is a multiple of PIECE, so that a row that many tokens
read (padding) is many programs' work. `sum_kernel` writes runs that are whole to the table; of a run that is cut it
leaves each piece's sum in `partial`, which `join_kernel` adds up in order. In PIECE places at most two pieces are cut:
the first belongs to a run from before (slot 0), the last to one that begins there (slot 1).

Shapes: T places in the order of `_token_order.py`, V rows of the table, N features, C = ceil(T / PIECE).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from pyralis.ops._triton import round_to, store_as, tl, triton


@triton.jit(do_not_specialize=["V"])
def gather_kernel(
    ids, table, y, V, table_stride, y_stride, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = col < N
    readable = tl.where((row >= 0) & (row < V), N, 0)
    value = tl.load(table + row * table_stride + col, mask=col < readable, other=float("nan")).to(tl.float32)
    if SCALED:
        value = round_to(value * scale, table.dtype.element_ty)
    store_as(y + token * y_stride + col, value, mask)


@triton.jit
def _learns(row, V, padding_id):
    return (row >= 0) & (row < V) & (row != padding_id)


@triton.jit
def _write_row(dtable, row, col, total, scale, N: tl.constexpr, ACCUMULATE: tl.constexpr):
    """dtable: the table's first row; row: where the row starts, in elements."""
    total = total * scale
    if ACCUMULATE:
        total += tl.load(dtable + row + col, mask=col < N, other=0.0).to(tl.float32)
    store_as(dtable + row + col, total, col < N)


@triton.jit(do_not_specialize=["V", "padding_id"])
def sum_kernel(
    dy, rows, tokens, ends, dtable, partial, V, dy_stride, dtable_stride, padding_id, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, AT_ONCE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    row = tl.load(rows + first).to(tl.int64)
    begins = (first == 0) | (tl.load(rows + first - 1, mask=first > 0, other=0).to(tl.int64) != row)
    if (begins | (first % PIECE == 0)) & _learns(row, V, padding_id):
        end = tl.load(ends + first).to(tl.int32)
        last = tl.minimum(end, first // PIECE * PIECE + PIECE)
        col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_N], tl.float32)
        for start in tl.range(first, last, AT_ONCE):
            for i in tl.static_range(AT_ONCE):  # loads in flight; the sum keeps the tokens' order
                live = start + i < last
                token = tl.load(tokens + start + i, mask=live, other=0).to(tl.int64)
                readable = tl.where(live, N, 0)
                total += tl.load(dy + token * dy_stride + col, mask=col < readable, other=0.0).to(tl.float32)
        if begins & (last == end):
            _write_row(dtable, row * dtable_stride, col, total, scale, N, ACCUMULATE)
        else:
            slot = 2 * (first // PIECE).to(tl.int64) + begins.to(tl.int64)
            tl.store(partial + slot * N + col, total, mask=col < N)


@triton.jit(do_not_specialize=["V", "padding_id"])
def join_kernel(
    rows, ends, partial, dtable, V, dtable_stride, padding_id, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, AT_ONCE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)  # of C - 1: no run goes on after the last
    first = chunk * PIECE
    after = first + PIECE
    row = tl.load(rows + after - 1).to(tl.int64)
    goes_on = tl.load(rows + after).to(tl.int64) == row
    begins = (chunk == 0) | (tl.load(rows + first - 1, mask=chunk > 0, other=0).to(tl.int64) != row)
    if goes_on & begins & _learns(row, V, padding_id):
        last = (tl.load(ends + after - 1).to(tl.int64) - 1) // PIECE
        col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.load(partial + (2 * chunk + 1) * N + col, mask=col < N, other=0.0)
        for start in tl.range(chunk + 1, last + 1, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                readable = tl.where(start + i <= last, N, 0)
                total += tl.load(partial + (start + i) * 2 * N + col, mask=col < readable, other=0.0)
        _write_row(dtable, row * dtable_stride, col, total, scale, N, ACCUMULATE)
