"""Launches of dropout masks to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.dropout_mask import masked
from tests.ops.aot import Case, meta


def _call(features: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        x, rng = meta(4096, features, dtype=dtype), meta(2, dtype=torch.int64)
        masked(x, rng, 7, 3277, meta(4096, features, dtype=dtype))
        masked(x, rng, 7, 3277, meta(4096, features + 64, dtype=dtype)[:, :features], scale=2.0, add=True)

    return call


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [Case(f"K={k} {dtype}", _call(k, dtype)) for k, dtype in product((4096, 960, 64), dtypes)]
