"""Launches of nf4 to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.nf4 import dequantize
from pyralis.ops.nf4_state import NestedAbsmax, Quantized
from tests.ops.aot import Case, meta


def matrix(n: int, k: int, *, nested: bool = True, blocksize: int = 64) -> Quantized:
    """A 4-bit matrix without data."""
    blocks = -(-n * k // blocksize)
    inner = None
    if nested:
        scale = meta(-(-blocks // 256), dtype=torch.float32)
        inner = NestedAbsmax(scale, meta(256, dtype=torch.float32), meta(dtype=torch.float32), 256)
    packed = meta((n * k + 1) // 2, dtype=torch.uint8)
    absmax = meta(blocks, dtype=torch.uint8 if nested else torch.float32)
    return Quantized(packed, absmax, (n, k), blocksize, "nf4", torch.bfloat16, inner)


def _call(n: int, k: int, dtype: torch.dtype, pad: int, nested: bool) -> Callable[[], None]:
    def call() -> None:
        dequantize(matrix(n, k, nested=nested), meta(n, k + pad, dtype=dtype)[:, :k])

    return call


def cases() -> list[Case]:
    shapes = ((4096, 4096), (4096, 14336), (4096, 11008), (3584, 18944), (576, 576), (64, 100), (5, 33))
    outputs = ((torch.bfloat16, 64), (torch.float16, 0), (torch.float32, 7), (torch.float32, 0))
    return [
        Case(f"[{n}, {k}] {dtype} pad={pad} nested={nested}", _call(n, k, dtype, pad, nested))
        for (n, k), (dtype, pad), nested in product(shapes, outputs, (True, False))
    ]
