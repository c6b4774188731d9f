"""Launches of adamw with float32 states to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops._triton import cdiv
from pyralis.ops.adamw import Groups, State32bit, adamw_step
from pyralis.ops.grad_norm import StepScalars
from tests.ops.aot import Case, meta

SIZES = (41_943_040, 2**31 + 512, 1001)
KINDS = (  # parameters, gradients, copy, how parameters are rounded
    (torch.float32, torch.float32, torch.bfloat16, None),
    (torch.float32, torch.float32, None, None),
    (torch.float32, torch.float16, torch.float16, None),
    (torch.bfloat16, torch.bfloat16, None, "stochastic"),
    (torch.bfloat16, torch.bfloat16, None, "split"),
    (torch.bfloat16, torch.bfloat16, None, None),
)


def call_of(
    n: int,
    kind: tuple[torch.dtype, torch.dtype, torch.dtype | None, str | None],
    state: Callable[[], object],
    groups: bool,
) -> Callable[[], None]:
    params, grads, copy, rounding = kind
    index = meta(cdiv(n, 256), dtype=torch.int32) if groups else None

    def call() -> None:
        adamw_step(
            meta(n, dtype=params), meta(n, dtype=grads), state(), StepScalars.new("meta"),  # type: ignore[arg-type]
            Groups(meta(3, dtype=torch.float32), meta(3, dtype=torch.float32), index),
            beta1=0.9, beta2=0.999, eps=1e-8, compute_copy=None if copy is None else meta(n, dtype=copy),
            seed=meta(1, dtype=torch.int64) if rounding == "stochastic" else None,
            low_bits=meta(n, dtype=torch.int16) if rounding == "split" else None,
        )  # fmt: skip

    return call


def cases() -> list[Case]:
    return [
        Case(f"n={n} {kind} groups={groups}", call_of(n, kind, lambda n=n: State32bit.zeros(n, "meta"), groups))
        for n, kind, groups in product(SIZES, KINDS, (False, True))
    ]
