"""Launches of glu to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import get_args

import torch

from pyralis.ops.glu import Activation, glu_backward, glu_forward, split_gate_up
from tests.ops.aot import Case, meta

T = 4096


def _call(size: int, dtype: torch.dtype, activation: Activation) -> Callable[[], None]:
    def call() -> None:
        gate, up = split_gate_up(meta(T, 2 * size, dtype=dtype))
        glu_forward(gate, up, activation, out=meta(T, size + 64, dtype=dtype))
        glu_forward(gate, up, activation)
        dh = meta(T, size + 64, dtype=dtype)[:, :size]
        glu_backward(dh, gate, up, activation, dgate=gate, dup=up)
        glu_backward(dh, gate, up, activation, need_h=False)

    return call


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [
        Case(f"I={size} {activation} {dtype}", _call(size, dtype, activation))
        for size, activation, dtype in product((14336, 18944, 1536, 200), get_args(Activation), dtypes)
    ]
