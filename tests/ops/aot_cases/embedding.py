"""Launches of embedding to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.embedding import embedding_backward, embedding_forward
from tests.ops.aot import Case, meta

T, V = 4096, 128256
HALVES = (torch.bfloat16, torch.float16)
LONG = 16384  # tokens whose ids are sorted by torch
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


def _long(n: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        dy, ids = meta(LONG, n, dtype=dtype), meta(LONG, dtype=torch.int64)
        embedding_backward(dy, ids, meta(V, n, dtype=dtype), accumulate=True)

    return call


def cases() -> list[Case]:
    found = [
        Case(f"N={n} {dtype} {stream} scale={scale}", _call(n, dtype, stream, scale))
        for n, (dtype, stream), scale in product((4096, 3584, 576, 64), DTYPES, (None, 64.0))
    ]
    return found + [Case(f"T={LONG} N={n} {dtype}", _long(n, dtype)) for n in (4096, 576) for dtype in HALVES]
