"""All 4-bit matrices of a layer dequantised by one launch, LoRA's B written beside them by the same.

A plan (`nf4_plan.py`) is made once for a layer: where its matrices lie, as a table of int64 on the device, and where
in an arena their values go. A destination is a view [N, K] of the arena or a wide one, [N, K + P], whose P last columns
get the rows of a block-diagonal B: matrices stacked along N share a buffer, each has its own columns for its B, the
rest is zero. So [x | s * x A^T] times the transposed wide matrix is the base projection and LoRA's in one product. Rows
of the arena may get copies of plain matrices, LoRA's A below the weights.

Shapes: N rows, K columns of a matrix, P wide columns after them, R rank of its B [N, R].
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from torch import Tensor

from pyralis.ops._triton import launch, store_as, tl, triton, unsupported_tensors
from pyralis.ops.nf4 import write_tile
from pyralis.ops.nf4_plan import LayerPlan
from pyralis.ops.nf4_state import code_tables, reference


def supported(plan: LayerPlan, out: Tensor) -> str | None:
    """Why the kernel cannot carry out `plan`; None if it can."""
    return unsupported_tensors(out) or plan.refused


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
    for c, offset in zip(plan.copies, plan.copy_offsets, strict=True):
        if adapters:
            out.as_strided(c.out.shape, c.out.stride(), out.storage_offset() + offset).copy_(c.source)


def dequantize_layer(plan: LayerPlan, out: Tensor, *, weights: bool = True, adapters: bool = True) -> None:
    """Write the plan's matrices, wide columns and copies into `out` by one launch.

    out: an arena laid out as the plan's, of its dtype: that one or another. weights=False leaves out the matrices,
    where those are kept and adapters have changed; adapters=False writes only them.
    """
    assert out.dim() == 1, f"an arena of shape {tuple(out.shape)}"
    assert out.dtype == plan.dtype, f"an arena of {out.dtype} for a plan of {plan.dtype}"
    assert out.numel() >= plan.extent, f"an arena of {out.numel()} elements, the plan needs {plan.extent}"
    if supported(plan, out) is not None:
        reference_layer(plan, out, weights=weights, adapters=adapters)
        return
    first = 0 if weights else plan.weight_tiles
    copies_from = plan.weight_tiles + plan.adapter_tiles
    last = copies_from + plan.copy_tiles if adapters else plan.weight_tiles
    device = out.device
    launch(
        _layer_kernel, (last - first,),
        plan.table, code_tables(device), out, plan.lora, plan.copy_table, first, plan.weight_tiles, copies_from,
        device=device, num_warps=plan.tiles.num_warps, fp_fusion=False, **plan.constants,
    )  # fmt: skip


@triton.jit
def _placement_of(tile, starts, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(which placement a tile belongs to, the tile's number in it) by the placements' first tiles."""
    i = tl.arange(0, BLOCK)
    start = tl.load(starts + i, mask=i < COUNT, other=0).to(tl.int32)
    begun = (i < COUNT) & (start <= tile)
    return tl.sum(begun.to(tl.int32), 0) - 1, tile - tl.max(tl.where(begun, start, 0), 0)


@triton.jit
def _write_columns(
    tile, table, out, lora, COUNT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, WIDE_ROWS: tl.constexpr
):  # fmt: skip
    """Some rows of a placement's wide columns: B and zeros."""
    placement, tile = _placement_of(tile, table + COUNT, COUNT, BLOCK)
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


@triton.jit
def _copy_row(tile, copies, out, COPIES: tl.constexpr, COPY_BLOCK: tl.constexpr, COPY_TILE: tl.constexpr):
    """A row of a copied matrix, or a part of one."""
    copy, tile = _placement_of(tile, copies, COPIES, COPY_BLOCK)
    at = copies + copy
    K = tl.load(at + 5 * COPIES).to(tl.int32)
    parts = tl.cdiv(K, COPY_TILE)
    row, col = (tile // parts).to(tl.int64), tile % parts * COPY_TILE + tl.arange(0, COPY_TILE)
    source = tl.load(at + 3 * COPIES).to(out.dtype) + row * tl.load(at + 4 * COPIES)
    value = tl.load(source + col, mask=col < K, other=0.0)
    tl.store(out + tl.load(at + COPIES) + row * tl.load(at + 2 * COPIES) + col, value, mask=col < K)


@triton.jit(do_not_specialize=["first", "weight_tiles", "copies_from"])
def _layer_kernel(
    table, tables, out, lora, copies, first, weight_tiles, copies_from,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, PLAIN: tl.constexpr,
    ALIGNED: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDE: tl.constexpr, WIDE_ROWS: tl.constexpr,
    COPIES: tl.constexpr, COPY_BLOCK: tl.constexpr, COPY_TILE: tl.constexpr,
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
    elif tile < copies_from:
        _write_columns(tile - weight_tiles, table, out, lora, COUNT, BLOCK, WIDE, WIDE_ROWS)
    elif COPIES > 0:
        _copy_row(tile - copies_from, copies, out, COPIES, COPY_BLOCK, COPY_TILE)
