"""Tokens put in the order of the ids they carry, on the device: which rows of a table meet, and in which order.

torch.sort is a radix sort of a dozen launches, and up to 4096 keys the work of one multiprocessor. Up to
RANKED_TOKENS each token finds its place by itself: it counts the tokens that come before it, T^2 comparisons of 32-bit
integers in one launch.

Shapes: T tokens.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, launch, tl, triton

RANKED_TOKENS = 8192
_MINE, _OTHERS, _WARPS = 16, 256, 4  # tokens of a program, and how many it looks at at a time


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """A stable sort: places [T] by row, within a row by token. Integers of 32 or 64 bits."""

    rows: Tensor  # [T]: the id in each place; ids outside the table are anything outside it
    tokens: Tensor  # [T]: the token in each place
    ends: Tensor  # [T]: where the run of places with the same row ends

    @classmethod
    def of(cls, ids: Tensor, table_rows: int) -> TokenOrder:
        """ids: [T] int64 or int32. Allocates what it returns, and above RANKED_TOKENS what torch.sort needs."""
        T = len(ids)
        if T > RANKED_TOKENS:
            rows, tokens = torch.sort(ids, stable=True)
            return cls(rows, tokens, torch.searchsorted(rows, rows, right=True))
        rows, tokens, ends = torch.empty((3, T), dtype=torch.int32, device=ids.device)
        launch(
            _rank_kernel, (cdiv(T, _MINE),), ids, rows, tokens, ends, T, table_rows,
            device=ids.device, num_warps=_WARPS, MINE=_MINE, OTHERS=_OTHERS,
        )  # fmt: skip
        return cls(rows, tokens, ends)


@triton.jit
def _row(ids, token, T, table_rows):
    """The row of each token as int32; table_rows for ids outside the table."""
    row = tl.load(ids + token, mask=token < T, other=-1)
    return tl.where((row >= 0) & (row < table_rows), row, table_rows).to(tl.int32)


@triton.jit(do_not_specialize=["T", "table_rows"])
def _rank_kernel(ids, rows, tokens, ends, T, table_rows, MINE: tl.constexpr, OTHERS: tl.constexpr):
    token = tl.program_id(0) * MINE + tl.arange(0, MINE)
    row = _row(ids, token, T, table_rows)
    before = tl.zeros([MINE, OTHERS], tl.int32)
    upto = tl.zeros([MINE, OTHERS], tl.int32)  # those of the same row and of rows below
    for start in tl.range(0, T, OTHERS):
        other = start + tl.arange(0, OTHERS)
        there = _row(ids, other, T, table_rows)[None, :]
        below = there < row[:, None]
        same = (there == row[:, None]) & (other < T)[None, :]
        before += (below | (same & (other[None, :] < token[:, None]))).to(tl.int32)
        upto += (below | same).to(tl.int32)
    place = tl.sum(before, 1)
    tl.store(rows + place, row, mask=token < T)
    tl.store(tokens + place, token, mask=token < T)
    tl.store(ends + place, tl.sum(upto, 1), mask=token < T)
