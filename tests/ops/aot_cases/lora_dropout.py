"""Launches of LoRA's dropout to compile ahead of time: kernels with `tl.dot`, or below 8.0 masked copies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.lora_dropout import project, project_backward
from pyralis.ops.lora_group import LoraGroup, LoraProjection
from tests.ops.aot import Case, meta

RANKS = (16, 3, 8, 32, 64, 128, 256)
SHAPES = ((4096, 4096, 3), (1000, 14336, 1), (4096, 3584, 2), (16384, 11008, 1))  # tokens, features, projections


def _dots(rank: int, tokens: int, features: int, count: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        (run,) = LoraGroup(features, (LoraProjection(64, rank, 2.0, 0.05),) * count).runs
        x, wide, rng = meta(tokens, features + 64, dtype=dtype), count * rank, meta(2, dtype=torch.int64)
        x = x[:, :features]
        A, columns = meta(wide, features, dtype=dtype), meta(tokens, features + wide, dtype=dtype)[:, features:]
        project(run, x, A, rng, 7, columns)
        dx = meta(tokens, features + 64, dtype=dtype)[:, :features]
        grad = meta(wide, features, dtype=torch.float32)
        project_backward(run, columns, x, A, rng, 7, dx, grad, accumulate=rank == 16)
        project_backward(run, columns, x, A, rng, 7, dx, None, add_dx=True)

    return call


def cases() -> list[Case]:
    halves = (torch.bfloat16, torch.float16)
    return [
        Case(f"r={rank} T={t} K={k} n={n} {dtype}", _dots(rank, t, k, n, dtype))
        for rank, (t, k, n), dtype in product(RANKS, SHAPES, halves)
        if not (rank == 256 and n == 3)
    ]
