"""Launches of rms_norm to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.rms_norm import rms_norm_backward, rms_norm_forward
from tests.ops.aot import Case, meta

T = 4096
STREAMS = (  # residual stream, weight and output, residual added first
    (torch.bfloat16, torch.bfloat16, True),
    (torch.float16, torch.float16, False),
    (torch.float32, torch.float32, True),
    (torch.float32, torch.bfloat16, True),
    (torch.float32, torch.float16, False),
)


def _call(n: int, stream: torch.dtype, half: torch.dtype, residual: bool, trained: bool) -> Callable[[], None]:
    def call() -> None:
        x, weight = meta(T, n, dtype=half if residual else stream), meta(n, dtype=half)
        _, h, rstd = rms_norm_forward(
            x, weight, 1e-5, unit_offset=not residual, out=meta(T, n + 64, dtype=half),
            residual=meta(T, n, dtype=stream) if residual else None,
        )  # fmt: skip
        rms_norm_backward(
            meta(T, n + 64, dtype=half)[:, :n], h, weight, rstd, unit_offset=not residual,
            residual_grad=meta(T, n, dtype=stream) if residual else None,
            branch_out=meta(T, n, dtype=half) if stream != half else None,
            dweight=meta(n, dtype=half) if trained else None,
        )  # fmt: skip

    return call


def cases() -> list[Case]:
    sizes = (4096, 3584, 64, 960, 2048, 5120, 8192, 12288, 16384)
    return [
        Case(f"N={n} {stream} {half} residual={residual} trained={trained}", _call(n, stream, half, residual, trained))
        for n, (stream, half, residual), trained in product(sizes, STREAMS, (False, True))
    ]
