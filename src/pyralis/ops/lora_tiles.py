"""Launches of LoRA's kernels, by rank: what a program holds at a time, and how many programs there are.

Block sizes are those measured best on an H100 over Llama-3-8B's shapes (K = 4096 and 14336, T = 4096); registers and
shared memory are held to every GPU's limits by `tests/ops/test_aot.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyralis.ops._triton import Gpu, cdiv, gpu_of, next_power_of_2, unsupported_tensors
from pyralis.ops.lora_group import Run

MOST_SPLITS = 16
TOGETHER = 3  # projections that the kernels have arguments for


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program holds of a [T, columns] matrix at a time, and how it is compiled.

    resident: warps that registers and shared memory leave on an SM, with 1, 2 and 3 projections in a program, which
    serves at most as many as there are figures.
    """

    block_t: int
    columns: int
    warps: int
    stages: int = 1
    resident: tuple[int, ...] = (16,)

    @property
    def together(self) -> int:
        return len(self.resident)

    def passes(self, run: Run, stream: int) -> Iterator[tuple[int, slice, int]]:
        """(projections, their ranks among the run's, the stream of the first) of each launch."""
        for j in range(0, run.count, self.together):
            count = min(self.together, run.count - j)
            yield count, slice(j * run.like.rank, (j + count) * run.like.rank), stream + j

    def splits(self, programs: int, most: int, count: int, sm_count: int) -> int:
        """Parts of a sum over `count` projections, added up afterwards: as many as the GPU runs at once, `programs`
        each. One program more would wait for a whole other to end."""
        slots = sm_count * self.resident[min(count, self.together) - 1] // self.warps
        return max(min(slots // max(programs, 1), most, MOST_SPLITS), 1)


@dataclass(frozen=True, slots=True)
class DotLaunch:
    """Launches of the kernels with `tl.dot`, for a rank.

    project and grad draw masks and are bound by those instructions; grad_B is bound by memory.
    """

    block_r: int
    project: Tile
    grad: Tile
    grad_B: Tile

    @classmethod
    def of(cls, rank: int) -> DotLaunch:
        block_r = max(16, next_power_of_2(rank))
        if block_r == 16:
            # Columns after a smaller rank are masked, for which three projections leave no registers on sm_86 and 89.
            project = Tile(64, 64, 4, 2, (28, 16, 12) if rank == 16 else (28, 16))
            grad = Tile(32, 64, 4, 1, (20, 16, 12))
            return cls(block_r, project, grad, grad_B=Tile(64, 512, 8, 2, (8,)))
        if block_r == 32:
            # Three projections of grad would spill on sm_90.
            project, grad = Tile(64, 64, 8, 1, (16, 12, 8)), Tile(32, 64, 4, 1, (16, 12))
        elif block_r == 64:
            project, grad = Tile(64, 128, 8), Tile(32, 64, 8, 1, (16, 16, 16))
        elif block_r == 128:
            project, grad = Tile(64, 64, 8), Tile(32, 64, 8)
        else:
            project, grad = Tile(32, 64, 8), Tile(32, 32, 8)
        return cls(block_r, project, grad, grad_B=Tile(64, 256, 8, 2))

    def grad_B_on(self, gpu: Gpu) -> Tile:
        """Narrower on AMD's gfx942, which has 64 KiB of shared memory for a program."""
        return replace(self.grad_B, columns=256) if gpu.capability == (9, 4) else self.grad_B


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
