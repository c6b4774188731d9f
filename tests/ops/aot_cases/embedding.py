"""Launches of embedding to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.embedding import embedding_backward, embedding_forward
from tests.ops.aot import Case, meta

T, V = 4096, 128256
DTYPES = (  # table, output
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
)


def _call(n: int, dtype: torch.dtype, stream: torch.dtype, scale: float | None) -> Callable[[], None]:
    def call() -> None:
        ids, table = meta(T, dtype=torch.int64), meta(V, n, dtype=dtype)
        embedding_forward(ids, table, scale, out=meta(T, n, dtype=stream))
        embedding_backward(meta(T, n, dtype=stream), ids, table, scale, padding_id=0)

    return call


def cases() -> list[Case]:
    return [
        Case(f"N={n} {dtype} {stream} scale={scale}", _call(n, dtype, stream, scale))
        for n, (dtype, stream), scale in product((4096, 3584, 576, 64, 8192), DTYPES, (None, 64.0))
    ]
