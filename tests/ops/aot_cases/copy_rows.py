"""Launches of copy_rows to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.copy_rows import copy_rows
from tests.ops.aot import Case, meta

T = 4096


def _call(features: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        x = meta(T, features, dtype=dtype)
        for room in (64, 5):
            wide = meta(T, features + room, dtype=dtype)[:, :features]
            copy_rows(wide, x)
            copy_rows(x, wide)

    return call


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [
        Case(f"N={n} {dtype}", _call(n, dtype)) for n, dtype in product((8192, 4096, 3584, 576, 200, 37, 1), dtypes)
    ]
