"""Launches of adamw with 8-bit states to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops._triton import cdiv
from pyralis.ops.adamw import Groups, adamw_step
from pyralis.ops.adamw_8bit import State8bit
from pyralis.ops.grad_norm import StepScalars
from tests.ops.aot import Case, meta

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def _state(n: int, mixed: bool) -> State8bit:
    blocks, wide = cdiv(n, 256), meta(2560, dtype=FLOAT)
    codes, scales = [meta(n, dtype=torch.uint8)] * 2, [meta(blocks, dtype=FLOAT)] * 2
    rest = (meta(blocks, dtype=torch.int32), wide, wide) if mixed else ()
    return State8bit(*codes, *scales, meta(896, dtype=FLOAT), *rest)


def _call(
    n: int,
    params: torch.dtype,
    grads: torch.dtype,
    copy: torch.dtype | None,
    rounding: str | None,
    groups: bool,
    mixed: bool,
) -> Callable[[], None]:
    def call() -> None:
        index = meta(cdiv(n, 256), dtype=torch.int32) if groups else None
        adamw_step(
            meta(n, dtype=params), meta(n, dtype=grads), _state(n, mixed), StepScalars.new("meta"),
            Groups(meta(3, dtype=FLOAT), meta(3, dtype=FLOAT), index), beta1=0.9, beta2=0.999, eps=1e-8,
            compute_copy=None if copy is None else meta(n, dtype=copy),
            seed=meta(1, dtype=torch.int64) if rounding == "stochastic" else None,
            low_bits=meta(n, dtype=torch.int16) if rounding == "split" else None,
        )  # fmt: skip

    return call


def cases() -> list[Case]:
    kinds = (
        (FLOAT, FLOAT, BRAIN, None),
        (FLOAT, FLOAT, None, None),
        (FLOAT, HALF, HALF, None),
        (BRAIN, BRAIN, None, "stochastic"),
        (BRAIN, BRAIN, None, "split"),
    )
    return [
        Case(f"n={n} {kind} groups={groups} mixed={mixed}", _call(n, *kind, groups, mixed))
        for n, kind, (groups, mixed) in product(
            (41_943_040, 2**31 + 512, 1001), kinds, ((False, False), (True, True), (True, False))
        )
    ]
