"""Launches of LoRA's kernels, by rank: what a program holds at a time, and how many programs there are.

Block sizes are those measured best on an H100 over Llama-3-8B's shapes (K = 4096 and 14336, T = 4096); registers and
shared memory are held to every GPU's limits by `tests/ops/test_aot.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, gpu_of, next_power_of_2, unsupported_tensors
from pyralis.ops.lora_group import Run

MOST_SPLITS = 16
TOGETHER = 3  # projections that the kernels have arguments for


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program holds of a [T, columns] matrix at a time, and how it is compiled.

    resident: warps that registers and shared memory leave on an SM, with 1, 2 and 3 projections in a program.
    """

    block_t: int
    columns: int
    warps: int
    stages: int = 1
    resident: tuple[int, int, int] = (16, 16, 16)

    def splits(self, programs: int, most: int, count: int, sm_count: int) -> int:
        """Parts of a sum, added up afterwards: as many as the GPU runs at once, `programs` each. One program more
        would wait for a whole other to end."""
        slots = sm_count * self.resident[count - 1] // self.warps
        return max(min(slots // max(programs, 1), most, MOST_SPLITS), 1)


@dataclass(frozen=True, slots=True)
class DotLaunch:
    """Launches of the kernels with `tl.dot`, for a rank.

    project and grad draw masks and are bound by those instructions; grad_B is bound by memory.
    together: the most projections that a program of theirs serves.
    """

    block_r: int
    together: int
    project: Tile
    grad: Tile
    grad_B: Tile

    @classmethod
    def of(cls, rank: int) -> DotLaunch:
        block_r = max(16, next_power_of_2(rank))
        if block_r == 16:
            return cls(
                block_r, TOGETHER,
                project=Tile(64, 64, 4, 2, (28, 16, 12)), grad=Tile(32, 64, 4, 1, (20, 16, 12)),
                grad_B=Tile(64, 512, 8, 2, (8, 8, 8)),
            )  # fmt: skip
        rows = 64 if block_r <= 128 else 32
        return cls(
            block_r, TOGETHER if block_r <= 64 else 1,
            project=Tile(rows, 128 if block_r == 64 else 64, 8),
            grad=Tile(32, 64, 4 if block_r <= 32 else 8, 1, (16, 12, 8) if block_r <= 32 else (16, 16, 16)),
            grad_B=Tile(64, 256, 8, 2),
        )  # fmt: skip

    def passes(self, run: Run, stream: int) -> Iterator[tuple[int, slice, int]]:
        """(projections, their ranks among the run's, the stream of the first) of each launch."""
        for j in range(0, run.count, self.together):
            count = min(self.together, run.count - j)
            yield count, slice(j * run.like.rank, (j + count) * run.like.rank), stream + j


def reads_dy_once(rank: int) -> bool:
    """Whether one kernel yields both dy B and dy^T xa, for which two products read dy twice.

    Each program leaves float32 partial sums behind, written and read again: 4 R (1 / columns of a program + 1 / rows)
    bytes for each byte of dy, a quarter of a read at rank 32. A wider program has no registers for more.
    """
    return rank <= 32


def supported(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels with `tl.dot` cannot take these tensors; None if they can."""
    if (reason := unsupported_tensors(x, *others)) is not None:
        return reason
    if x.dtype == torch.float32:
        return "float32: cuBLAS multiplies it faster, and exactly"
    if gpu_of(x.device).capability < (8, 0):
        return "tl.dot has no tensor cores below compute capability 8.0"
    return None


def span_of(total: int, block: int, splits: int) -> int:
    """Blocks of each split."""
    return cdiv(cdiv(total, block), splits)
