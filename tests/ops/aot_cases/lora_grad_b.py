"""Launches of LoRA's one pass over dy to compile ahead of time; below 8.0 cuBLAS does it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.lora_grad_b import grad_B
from pyralis.ops.lora_group import LoraGroup, LoraProjection
from tests.ops.aot import Case, meta

SHAPES = ((4096, (4096, 1024, 1024)), (1000, (14336, 14336)), (16384, (3584,)))  # tokens, features


def _grad_B(rank: int, tokens: int, features: tuple[int, ...], dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        group = LoraGroup(4096, tuple(LoraProjection(n, rank, 2.0) for n in features))
        N, P = group.out_features, group.pad
        wide, weight = meta(tokens, N + P, dtype=dtype), meta(N, 4096 + P, dtype=dtype)
        B = [weight[r, 4096:][:, c] for r, c in zip(group.rows, group.columns)]
        dB = [meta(n, rank, dtype=torch.float32) for n in features]
        dy = meta(tokens, N, dtype=dtype) if len(features) == 1 else wide[:, :N]
        copy = wide[:, :N] if len(features) == 1 else None
        xa = meta(tokens, 4096 + P, dtype=dtype)[:, 4096:]
        grad_B(group, dy, B, xa, wide[:, N:], dB, dropout=False, accumulate=rank == 16, copy=copy)

    return call


def cases() -> list[Case]:
    halves = (torch.bfloat16, torch.float16)
    return [
        Case(f"r={rank} T={t} N={n} {dtype}", _grad_B(rank, t, n, dtype), (8, 0))
        for rank, (t, n), dtype in product((16, 3, 8, 32), SHAPES, halves)
    ]
