"""All 4-bit matrices of a layer dequantised by one launch, LoRA's B written beside them by the same.

A plan is made once for a layer: where its matrices lie, as a table of int64 on the device, and where in an arena their
values go. A destination is a view [N, K] of the arena or a wide one, [N, K + P], whose P last columns get the rows of a
block-diagonal B: matrices stacked along N share a buffer, each has its own columns for its B, the rest is zero. So
[x | s * x A^T] times the transposed wide matrix is the base projection and LoRA's in one product.

Shapes: N rows, K columns of a matrix, P wide columns after them, R rank of its B [N, R].
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, launch, next_power_of_2, store_as, tl, triton, unsupported_tensors
from pyralis.ops.nf4 import TileLaunch, log2, write_tile
from pyralis.ops.nf4_state import TABLE_START, Quantized, code_tables, reference

ADAPTER_TILE = 1024  # elements of a program that writes wide columns


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """A matrix and where it goes."""

    matrix: Quantized
    out: Tensor  # [N, K + P], a view of the plan's arena; rows at any distance
    lora_B: Tensor | None = None  # [N, R], any float dtype and row stride; without one the wide columns are zeroed
    lora_start: int = 0  # which of the P columns is B's first

    @property
    def wide(self) -> int:
        return self.out.shape[1] - self.matrix.shape[1]

    @property
    def rank(self) -> int:
        return 0 if self.lora_B is None else self.lora_B.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """A layer's placements, ready to launch. Holds its tensors: one that is replaced needs a new plan."""

    placements: tuple[Placement, ...]
    offsets: tuple[int, ...]  # of the destinations in the arena, in elements
    table: Tensor  # [fields, placements] int64: first weight tile, first adapter tile, then `_describe`
    tiles: TileLaunch
    weight_tiles: int
    adapter_tiles: int
    adapter_block: int  # a power of two >= the widest P
    dtype: torch.dtype
    extent: int  # elements of the arena that are written to or lie between

    @classmethod
    def of(cls, placements: Sequence[Placement], arena: Tensor) -> LayerPlan:
        """Plan for destinations in `arena` (1-D, contiguous). Not during graph capture: the table is copied there."""
        offsets = tuple(int(p.out.storage_offset() - arena.storage_offset()) for p in placements)
        for placement, offset in zip(placements, offsets, strict=True):
            _check(placement, arena, offset)
        kinds = {p.lora_B.dtype for p in placements if p.lora_B is not None}
        assert len(kinds) < 2, f"lora_B of different dtypes: {kinds}"
        matrices = [p.matrix for p in placements]
        tiles = TileLaunch.of(matrices, arena.dtype, (*offsets, *(p.out.stride(0) for p in placements)))
        block = next_power_of_2(max(p.wide for p in placements))
        rows, first, first_adapter = [], 0, 0
        for placement, offset in zip(placements, offsets, strict=True):
            rows.append([first, first_adapter, *_describe(placement, offset)])
            first += tiles.tiles(placement.matrix)
            if placement.wide:
                first_adapter += cdiv(placement.matrix.shape[0], max(1, ADAPTER_TILE // block))
        extents = [o + (p.out.shape[0] - 1) * p.out.stride(0) + p.out.shape[1] for p, o in zip(placements, offsets)]
        table = torch.tensor(rows, dtype=torch.int64).t().contiguous().to(arena.device)
        code_tables(arena.device)
        return cls(tuple(placements), offsets, table, tiles, first, first_adapter, block, arena.dtype, max(extents))


def _check(p: Placement, arena: Tensor, offset: int) -> None:
    N = p.matrix.shape[0]
    assert arena.dim() == 1, f"an arena of shape {tuple(arena.shape)}"
    assert p.out.shape[0] == N, f"out of shape {tuple(p.out.shape)} for a matrix of {p.matrix.shape}"
    assert p.wide >= 0, f"out of shape {tuple(p.out.shape)} for a matrix of {p.matrix.shape}"
    assert p.out.dtype == arena.dtype, f"out of {p.out.dtype} in an arena of {arena.dtype}"
    assert p.out.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr(), "out is not a view of the arena"
    assert offset >= 0, "out begins before the arena"
    assert p.out.stride(1) == 1, "out's columns are strided"
    assert p.matrix.device == arena.device, f"a matrix on {p.matrix.device}, the arena on {arena.device}"
    if p.lora_B is not None:
        assert p.lora_B.shape[0] == N, f"lora_B of shape {tuple(p.lora_B.shape)} for a matrix of {p.matrix.shape}"
        assert p.lora_B.stride(1) == 1 or p.rank == 1, "lora_B's columns are strided"
        assert p.lora_start + p.rank <= p.wide, f"lora_B at {p.lora_start} + {p.rank} of {p.wide} wide columns"


def _describe(p: Placement, offset: int) -> list[int]:
    """Fields 2 to 18 of a placement's column of the table; `_layer_kernel` reads them by these numbers."""
    q, n, B = p.matrix, p.matrix.nested, p.lora_B
    nested = (0, 0, 0, 0) if n is None else (n.absmax.data_ptr(), n.code.data_ptr(), n.offset.data_ptr(), n.blocksize)
    return [
        offset, p.out.stride(0), *q.shape,  # 2 3 4 5
        q.packed.data_ptr(), q.absmax.data_ptr(), log2(q.blocksize), TABLE_START[q.quant_type],  # 6 7 8 9
        *nested[:3], log2(nested[3]),  # 10 11 12 13
        p.wide, 0 if B is None else B.data_ptr(), 0 if B is None else B.stride(0), p.lora_start, p.rank,  # 14 to 18
    ]  # fmt: skip


def supported(plan: LayerPlan, out: Tensor) -> str | None:
    """Why the kernel cannot carry out `plan`; None if it can."""
    return unsupported_tensors(out, *(p.lora_B for p in plan.placements))


def reference_layer(plan: LayerPlan, out: Tensor, *, weights: bool = True, adapters: bool = True) -> None:
    """What `dequantize_layer` writes, in readable torch."""
    for p, offset in zip(plan.placements, plan.offsets, strict=True):
        N, K = p.matrix.shape
        wide = out.as_strided((N, K + p.wide), (p.out.stride(0), 1), out.storage_offset() + offset)
        if weights:
            wide[:, :K] = reference(p.matrix, out.dtype)
        if adapters:
            wide[:, K:] = 0
            if p.lora_B is not None:
                wide[:, K + p.lora_start : K + p.lora_start + p.rank] = p.lora_B.detach()


def dequantize_layer(plan: LayerPlan, out: Tensor, *, weights: bool = True, adapters: bool = True) -> None:
    """Write the plan's matrices and wide columns into `out` by one launch.

    out: an arena laid out as the plan's, of its dtype: that one or another. weights=False rewrites only the wide
    columns, where dequantised matrices are kept and B has changed; adapters=False only the matrices.
    """
    assert out.dim() == 1, f"an arena of shape {tuple(out.shape)}"
    assert out.dtype == plan.dtype, f"an arena of {out.dtype} for a plan of {plan.dtype}"
    assert out.numel() >= plan.extent, f"an arena of {out.numel()} elements, the plan needs {plan.extent}"
    if supported(plan, out) is not None:
        reference_layer(plan, out, weights=weights, adapters=adapters)
        return
    first = 0 if weights else plan.weight_tiles
    last = plan.weight_tiles + (plan.adapter_tiles if adapters else 0)
    count, tiles = len(plan.placements), plan.tiles
    nested = {p.matrix.nested is not None for p in plan.placements}
    launch(
        _layer_kernel, (last - first,),
        plan.table, code_tables(out.device), out, next((p.lora_B for p in plan.placements if p.rank), None),
        first, plan.weight_tiles,
        device=out.device, num_warps=tiles.num_warps, fp_fusion=False,
        COUNT=count, BLOCK=next_power_of_2(count), NESTED=True in nested, PLAIN=False in nested,
        ALIGNED=tiles.aligned,
        VEC=tiles.vector, ROWS=tiles.rows, COLS=tiles.cols,
        WIDE=plan.adapter_block, WIDE_ROWS=max(1, ADAPTER_TILE // plan.adapter_block),
    )  # fmt: skip


@triton.jit
def _placement_of(tile, starts, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(which placement a tile belongs to, the tile's number in it) by the placements' first tiles."""
    i = tl.arange(0, BLOCK)
    start = tl.load(starts + i, mask=i < COUNT, other=0).to(tl.int32)
    begun = (i < COUNT) & (start <= tile)
    return tl.sum(begun.to(tl.int32), 0) - 1, tile - tl.max(tl.where(begun, start, 0), 0)


@triton.jit(do_not_specialize=["first", "weight_tiles"])
def _layer_kernel(
    table, tables, out, lora, first, weight_tiles,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, PLAIN: tl.constexpr,
    ALIGNED: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDE: tl.constexpr, WIDE_ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) + first
    if tile < weight_tiles:
        placement, tile = _placement_of(tile, table, COUNT, BLOCK)
        at = table + placement
        offset = tl.load(at + 2 * COUNT)
        if ALIGNED:
            offset = offset // 8 * 8  # shows the compiler that rows begin on 16 bytes
        stride = tl.load(at + 3 * COUNT).to(tl.int32)
        N, K = tl.load(at + 4 * COUNT).to(tl.int32), tl.load(at + 5 * COUNT).to(tl.int32)
        packed = tl.load(at + 6 * COUNT).to(tl.pointer_type(tl.uint8))
        absmax = tl.load(at + 7 * COUNT)
        block_shift, values = tl.load(at + 8 * COUNT).to(tl.int32), tables + tl.load(at + 9 * COUNT)
        scale_address = tl.load(at + 10 * COUNT)
        scale = scale_address.to(tl.pointer_type(tl.float32))
        code = tl.load(at + 11 * COUNT).to(tl.pointer_type(tl.float32))
        absmax_offset = tl.load(at + 12 * COUNT).to(tl.pointer_type(tl.float32))
        nested_shift = tl.load(at + 13 * COUNT).to(tl.int32)
        if NESTED and (not PLAIN or scale_address != 0):
            write_tile(
                tile, packed, absmax.to(tl.pointer_type(tl.uint8)), scale, code, absmax_offset, values, out + offset,
                N, K, stride, block_shift, nested_shift, True, ALIGNED, VEC, ROWS, COLS,
            )  # fmt: skip
        elif PLAIN:
            write_tile(
                tile, packed, absmax.to(tl.pointer_type(tl.float32)), None, None, None, values, out + offset,
                N, K, stride, block_shift, nested_shift, False, ALIGNED, VEC, ROWS, COLS,
            )  # fmt: skip
    else:
        placement, tile = _placement_of(tile - weight_tiles, table + COUNT, COUNT, BLOCK)
        at = table + placement
        P = tl.load(at + 14 * COUNT)
        row = tile.to(tl.int64) * WIDE_ROWS + tl.arange(0, WIDE_ROWS)
        col = tl.arange(0, WIDE)
        mask = (row < tl.load(at + 4 * COUNT))[:, None] & (col < P)[None, :]
        value = tl.zeros([WIDE_ROWS, WIDE], tl.float32)
        if lora is not None:
            B = tl.load(at + 15 * COUNT).to(lora.dtype)
            rank_col = col - tl.load(at + 17 * COUNT)
            inside = mask & ((rank_col >= 0) & (rank_col < tl.load(at + 18 * COUNT)))[None, :]
            source = B + row[:, None] * tl.load(at + 16 * COUNT) + rank_col[None, :]
            value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        destination = out + tl.load(at + 2 * COUNT) + tl.load(at + 5 * COUNT)
        store_as(destination + row[:, None] * tl.load(at + 3 * COUNT) + col[None, :], value, mask)
