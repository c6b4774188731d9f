"""Launches of DoRA's norms to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.dora import norms_and_ratio
from pyralis.ops.lora_group import LoraGroup, LoraProjection
from tests.ops.aot import Case, meta

SHAPES = ((4096, (4096, 1024, 1024)), (14336, (4096,)), (200, (300,)))  # features in, out


def _call(rank: int, features: int, outputs: tuple[int, ...], dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        group = LoraGroup(features, tuple(LoraProjection(n, rank, 2.0) for n in outputs), dora=True)
        weight, A = meta(group.height, group.width, dtype=dtype), meta(group.pad, features, dtype=dtype)
        norms_and_ratio(group, weight, A, [meta(n, dtype=torch.float32) for n in outputs])

    return call


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [
        Case(f"r={rank} K={k} N={n} {dtype}", _call(rank, k, n, dtype))
        for rank, (k, n), dtype in product((16, 3, 256), SHAPES, dtypes)
    ]
