"""4-bit matrices dequantised, the nested absmax decoded in the same pass: bit-equal to bitsandbytes.

The maths, the parts of a matrix and the readable reference are in `nf4_state.py`; a layer's matrices in one launch in
`nf4_layer.py`. Equal to `bitsandbytes.functional.dequantize_4bit` but for the sign of FP4's second zero (bits 1000):
+0.0 as in bitsandbytes' table and on its CPU path, where its CUDA kernels give -0.0.

Shapes: N rows, K columns of a matrix; a program has ROWS x COLS elements of it, in vectors of VEC along K.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, launch, next_power_of_2, store_as, tl, triton, unsupported_tensors
from pyralis.ops.nf4_state import TABLE_START, Quantized, code_tables, reference


@dataclass(frozen=True, slots=True)
class TileLaunch:
    """How matrices are cut into tiles, and what all of them allow."""

    rows: int
    cols: int
    vector: int  # elements of a load: a word of 8, or 1 where rows begin inside a word
    aligned: bool  # every row of the output begins on 16 bytes, if its memory does
    num_warps: int = 4

    @classmethod
    def of(cls, matrices: Sequence[Quantized], dtype: torch.dtype, offsets: Iterable[int]) -> TileLaunch:
        """For outputs of `dtype` at these offsets and row strides (elements).

        A thread has 32 elements, which are four 16-byte stores of a half precision in 34 to 46 registers; 16 where
        more registers would be spilled. A tile has at most four rows: with eight, writes come in pieces of 1 KB and an
        H100 moves 2.0 TB/s instead of 2.8. Of the column counts left the widest is taken that leaves the fewest lanes
        idle past the ends of rows; one lane in eight idle costs nothing (K = 3584: 2.77 TB/s).
        """
        aligned = all(n % 8 == 0 for n in offsets)
        whole = all(q.shape[1] % 8 == 0 and q.packed.data_ptr() % 4 == 0 for q in matrices)
        tile = 4096 if whole and aligned and dtype.itemsize == 2 else 2048
        most = min(max(next_power_of_2(max(q.shape[1] for q in matrices)), 256), tile)
        candidates = [most >> i for i in range(3) if most >> i >= max(tile // 4, 256)] or [most]
        work = {cols: sum(q.shape[0] * cdiv(q.shape[1], cols) * cols for q in matrices) for cols in candidates}
        cols = min(candidates, key=lambda c: (work[c], -c))
        return cls(tile // cols, cols, 8 if whole else 1, aligned)

    def tiles(self, q: Quantized) -> int:
        return cdiv(q.shape[0], self.rows) * cdiv(q.shape[1], self.cols)


def supported(q: Quantized, out: Tensor) -> str | None:
    """Why the kernels cannot write `q` into `out`; None if they can."""
    if q.device != out.device:
        return f"a matrix on {q.device}, an output on {out.device}"
    return unsupported_tensors(out)


def dequantize(q: Quantized, out: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [N, K] that q stands for, in one launch.

    out: [N, K] of float32, float16 or bfloat16 and any row stride; by default allocated in `dtype`, by default that of
    the matrix that was quantised.
    """
    N, K = q.shape
    if out is None:
        out = torch.empty((N, K), dtype=q.dtype if dtype is None else dtype, device=q.device)
    assert out.shape == (N, K), f"out of shape {tuple(out.shape)} for a matrix of {q.shape}"
    assert dtype in (None, out.dtype), f"dtype {dtype} asked for, out has {out.dtype}"
    if supported(q, out) is not None:
        return out.copy_(reference(q, out.dtype))
    plan = TileLaunch.of([q], out.dtype, (out.stride(0),))
    nested = q.nested
    launch(
        _matrix_kernel, (plan.tiles(q),),
        q.packed, q.absmax,
        None if nested is None else nested.absmax,
        None if nested is None else nested.code,
        None if nested is None else nested.offset,
        code_tables(q.device), out, N, K, out.stride(0), TABLE_START[q.quant_type],
        log2(q.blocksize), 0 if nested is None else log2(nested.blocksize),
        device=out.device, num_warps=plan.num_warps, fp_fusion=False,
        ALIGNED=plan.aligned, VEC=plan.vector, ROWS=plan.rows, COLS=plan.cols,
    )  # fmt: skip
    return out


def log2(power_of_2: int) -> int:
    return power_of_2.bit_length() - 1


@triton.jit
def write_tile(
    tile, packed, absmax, scale, code, offset, table, out, N, K, stride, block_shift, nested_shift,
    NESTED: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of a matrix. What can pass 2^31 is a scalar, offsets inside the tile are int32: fewer registers."""
    columns = tl.cdiv(K, COLS)
    first_row, first_col = (tile // columns) * ROWS, (tile % columns) * COLS
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS // VEC) * VEC
    mask = (row < N - first_row)[:, None] & (col < K - first_col)[None, :]
    first = first_row.to(tl.int64) * K + first_col
    element = row[:, None] * K + col[None, :]  # from `first`
    if VEC == 8:
        word = tl.load((packed + (first >> 1)).to(tl.pointer_type(tl.uint32)) + (element >> 3), mask=mask, other=0)
        shift = (4 * (tl.arange(0, 8) ^ 1))[None, None, :]  # little-endian, a byte's upper half first
    else:
        element += (first & 1).to(tl.int32)
        word = tl.load(packed + (first >> 1) + (element >> 1), mask=mask, other=0).to(tl.uint32)
        shift = (4 - 4 * (element & 1))[:, :, None]
    nibble = ((word[:, :, None] >> shift.to(tl.uint32)) & 15).to(tl.int32)

    first_block = first >> block_shift
    block = ((first - (first_block << block_shift)).to(tl.int32) + element) >> block_shift  # from `first_block`
    if NESTED:
        index = tl.load(absmax + first_block + block, mask=mask, other=0).to(tl.int32)
        first_scale = first_block >> nested_shift
        block += (first_block - (first_scale << nested_shift)).to(tl.int32)
        factor = tl.load(scale + first_scale + (block >> nested_shift), mask=mask, other=0.0)
        factor = tl.load(code + index) * factor + tl.load(offset)
    else:
        factor = tl.load(absmax + first_block + block, mask=mask, other=0.0)

    if ALIGNED:
        stride = stride // 8 * 8  # shows the compiler that rows begin on 16 bytes
    at = (row * stride)[:, None, None] + col[None, :, None] + tl.arange(0, VEC)[None, None, :]
    value = tl.load(table + nibble) * factor[:, :, None]
    store_as(out + (first_row.to(tl.int64) * stride + first_col) + at, value, mask[:, :, None])


@triton.jit(do_not_specialize=["N", "K", "stride", "table_start", "block_shift", "nested_shift"])
def _matrix_kernel(
    packed, absmax, scale, code, offset, tables, out, N, K, stride, table_start, block_shift, nested_shift,
    ALIGNED: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    write_tile(
        tl.program_id(0), packed, absmax, scale, code, offset, tables + table_start, out, N, K, stride,
        block_shift, nested_shift, scale is not None, ALIGNED, VEC, ROWS, COLS,
    )  # fmt: skip
