"""Launches of layer_norm to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.layer_norm import layer_norm_backward, layer_norm_forward
from tests.ops.aot import Case, meta

T = 4096


def _call(n: int, stream: torch.dtype, half: torch.dtype, residual: bool, trained: bool) -> Callable[[], None]:
    def call() -> None:
        x, weight, bias = meta(T, n, dtype=half if residual else stream), meta(n, dtype=half), meta(n, dtype=half)
        _, h, mean, rstd = layer_norm_forward(
            x, weight, bias, 1e-5, out=meta(T, n + 64, dtype=half),
            residual=meta(T, n, dtype=stream) if residual else None,
        )  # fmt: skip
        layer_norm_backward(
            meta(T, n + 64, dtype=half)[:, :n], h, weight, mean, rstd,
            residual_grad=meta(T, n, dtype=stream) if residual else None,
            dweight=meta(n, dtype=half) if trained else None, dbias=meta(n, dtype=half) if trained else None,
        )  # fmt: skip

    return call


def cases() -> list[Case]:
    streams = ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16))
    return [
        Case(f"N={n} {stream} {half} residual={residual} trained={trained}", _call(n, stream, half, residual, trained))
        for n, (stream, half), residual, trained in product(
            (4096, 768, 2560, 8192, 16384), streams, (False, True), (False, True)
        )
    ]
