"""Launches of feature_scale to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.feature_scale import feature_scale, feature_scale_backward
from tests.ops.aot import Case, meta

T = 4096


def _call(features: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        u, wide = meta(T, features, dtype=dtype), meta(T, features + 64, dtype=dtype)[:, :features]
        ratio, dm = meta(features, dtype=torch.float32), meta(features, dtype=torch.float32)
        feature_scale(u, ratio, bias=meta(features, dtype=dtype), out=wide)
        feature_scale(u, ratio, residual=u)
        feature_scale_backward(wide, ratio, u, ratio, dm, out=wide)
        feature_scale_backward(u, ratio)

    return call


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [Case(f"N={n} {dtype}", _call(n, dtype)) for n, dtype in product((28672, 6144, 3584, 200), dtypes)]
