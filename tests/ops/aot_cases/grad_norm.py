"""Launches of grad_norm to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.grad_norm import StepScalars, begin_step
from tests.ops.aot import Case, meta


def _call(n: int, dtype: torch.dtype, clip: bool, scaled: bool, measure: bool) -> Callable[[], None]:
    def call() -> None:
        flag = meta(1, dtype=torch.float32) if scaled else None
        begin_step(
            meta(n, dtype=dtype), StepScalars.new("meta"), beta1=0.9, beta2=0.999,
            max_norm=1.0 if clip else None, grad_scale=flag, found_inf=flag, measure=measure,
        )  # fmt: skip

    return call


def cases() -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [
        Case(f"n={n} {dtype} clip={clip} scaled={scaled} measure={measure}", _call(n, dtype, clip, scaled, measure))
        for n, dtype, scaled, (clip, measure) in product(
            (41_943_040, 2**31 + 512, 1001), dtypes, (False, True), ((True, True), (False, True), (False, False))
        )
    ]
