"""Where the 4-bit matrices of a layer and its adapters go: the tables that `nf4_layer.py`'s launch reads.

A destination is a view [N, K] of an arena or a wide one, [N, K + P], whose P last columns get the rows of a
block-diagonal B. Shapes as in `nf4_layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, next_power_of_2, unsuited_tensors
from pyralis.ops.nf4 import TileLaunch, log2
from pyralis.ops.nf4_state import TABLE_START, Quantized, code_tables

ADAPTER_TILE = 1024  # elements of a program that writes wide columns
COPY_TILE = 1024  # and of one that copies rows; more would take registers from all


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
class Copy:
    """Rows that are copied: source [P, K] of the arena's dtype, out a view of the arena; rows at any distance."""

    source: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """A layer's placements, ready to launch. Holds its tensors: one that is replaced needs a new plan."""

    placements: tuple[Placement, ...]
    copies: tuple[Copy, ...]
    offsets: tuple[int, ...]  # of the destinations in the arena, in elements
    copy_offsets: tuple[int, ...]
    table: Tensor  # [fields, placements] int64: first weight tile, first adapter tile, then `_describe`
    copy_table: Tensor | None  # [fields, copies] int64: first tile, then `_describe_copy`
    tiles: TileLaunch
    weight_tiles: int
    adapter_tiles: int
    copy_tiles: int
    dtype: torch.dtype
    extent: int  # elements of the arena that are written to or lie between
    constants: Mapping[str, Any]  # of the kernel
    lora: Tensor | None  # one of the B, for their dtype
    refused: str | None  # why the kernel cannot read the tensors

    @classmethod
    def of(cls, placements: Sequence[Placement], arena: Tensor, copies: Sequence[Copy] = ()) -> LayerPlan:
        """Plan for destinations in `arena` (1-D, contiguous). Not during graph capture: the table is copied there."""
        outs = [*(p.out for p in placements), *(c.out for c in copies)]
        places = [int(out.storage_offset() - arena.storage_offset()) for out in outs]
        offsets, copy_offsets = tuple(places[: len(placements)]), tuple(places[len(placements) :])
        for placement, offset in zip(placements, offsets, strict=True):
            _check(placement, arena, offset)
        kinds = {p.lora_B.dtype for p in placements if p.lora_B is not None}
        assert len(kinds) < 2, f"lora_B of different dtypes: {kinds}"
        matrices = [p.matrix for p in placements]
        tiles = TileLaunch.of(matrices, arena.dtype, (*offsets, *(p.out.stride(0) for p in placements)))
        block = next_power_of_2(max(p.wide for p in placements))  # columns of a tile of adapters
        rows, first, first_adapter = [], 0, 0
        for placement, offset in zip(placements, offsets, strict=True):
            rows.append([first, first_adapter, *_describe(placement, offset)])
            first += tiles.tiles(placement.matrix)
            if placement.wide:
                first_adapter += cdiv(placement.matrix.shape[0], max(1, ADAPTER_TILE // block))
        copy_rows, first_copy = [], 0
        for copy, offset in zip(copies, copy_offsets, strict=True):
            _check_copy(copy, arena)
            copy_rows.append([first_copy, *_describe_copy(copy, offset)])
            first_copy += copy.source.shape[0] * cdiv(copy.source.shape[1], COPY_TILE)
        extents = [place + (out.shape[0] - 1) * out.stride(0) + out.shape[1] for out, place in zip(outs, places)]
        table, copy_table = (
            torch.tensor(fields, dtype=torch.int64).t().contiguous().to(arena.device) if fields else None
            for fields in (rows, copy_rows)
        )
        assert table is not None
        code_tables(arena.device)
        nested = {p.matrix.nested is not None for p in placements}
        constants = {
            "COUNT": len(placements), "BLOCK": next_power_of_2(len(placements)), "NESTED": True in nested,
            "PLAIN": False in nested, "ALIGNED": tiles.aligned, "VEC": tiles.vector, "ROWS": tiles.rows,
            "COLS": tiles.cols, "WIDE": block, "WIDE_ROWS": max(1, ADAPTER_TILE // block), "COPIES": len(copies),
            "COPY_BLOCK": max(2, next_power_of_2(len(copies))), "COPY_TILE": COPY_TILE,
        }  # fmt: skip
        refused = unsuited_tensors(arena, *(p.lora_B for p in placements), *(c.source for c in copies))
        return cls(
            tuple(placements), tuple(copies), offsets, copy_offsets, table, copy_table, tiles,
            first, first_adapter, first_copy, arena.dtype, max(extents),
            constants, next((p.lora_B for p in placements if p.rank), None), refused,
        )  # fmt: skip


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


def _check_copy(copy: Copy, arena: Tensor) -> None:
    assert copy.source.shape == copy.out.shape, f"{tuple(copy.source.shape)} copied to {tuple(copy.out.shape)}"
    assert copy.source.dtype == copy.out.dtype == arena.dtype, f"{copy.source.dtype} copied to {arena.dtype}"
    assert copy.source.stride(1) == copy.out.stride(1) == 1, "columns are strided"
    assert copy.out.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr(), "out is not a view of the arena"


def _describe_copy(copy: Copy, offset: int) -> list[int]:
    """Fields 1 to 5 of a copy's column of its table."""
    return [offset, copy.out.stride(0), copy.source.data_ptr(), copy.source.stride(0), copy.source.shape[1]]


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
