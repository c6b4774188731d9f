"""Launches of the GLU with LoRA's sums to compile ahead of time; below 8.0 the separate ops serve."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import get_args

import torch

from pyralis.ops.glu import Activation
from pyralis.ops.glu_lora import DownGradients, GateUpGradients, glu_lora_backward, glu_lora_forward
from pyralis.ops.lora_group import LoraGroup, LoraProjection
from tests.ops.aot import Case, meta

SHAPES = ((4096, 14336), (1000, 18944), (16384, 200))  # tokens, features
ADAPTED = {"gate up down": (1, 1, 1), "gate": (1, 0, 0), "up down": (0, 1, 1), "down": (0, 0, 1)}


def _call(
    rank: int, tokens: int, size: int, dtype: torch.dtype, activation: Activation, adapted: tuple[int, int, int]
) -> Callable[[], None]:
    def call() -> None:
        group = LoraGroup(4096, tuple(LoraProjection(size, rank * has, 2.0) for has in adapted[:2]))
        into = LoraGroup(size, (LoraProjection(4096, rank, 2.0),))
        N, P = group.out_features, group.pad
        wide, weight = meta(tokens, N + P, dtype=dtype), meta(N, 4096 + P, dtype=dtype)
        lora = down = None
        if group.rank:
            B = [
                weight[r, 4096:][:, c] if p.rank else None
                for r, c, p in zip(group.rows, group.columns, group.projections)
            ]
            dB = [meta(size, rank, dtype=torch.float32) if p.rank else None for p in group.projections]
            lora = GateUpGradients(group, B, meta(tokens, 4096 + P, dtype=dtype)[:, 4096:], wide[:, N:], dB, rank == 16)
        if adapted[2]:
            t = meta(tokens, 4096 + 64, dtype=dtype)[:, 4096 : 4096 + rank]
            down = DownGradients(t, meta(rank, size, dtype=torch.float32), rank == 16)
        glu_lora_backward(meta(tokens, size, dtype=dtype), wide[:, :N], activation, lora=lora, down=down)
        A, out = meta(into.pad, size, dtype=dtype), meta(tokens, into.width, dtype=dtype)
        glu_lora_forward(wide[:, :N], activation, into, A, out=out)

    return call


def cases() -> list[Case]:
    bf16, fp16 = torch.bfloat16, torch.float16
    silu, *others = get_args(Activation)
    some = [*product((16, 32), SHAPES, (bf16, fp16), (silu,), ("gate up down",))]
    some += product((3, 8), SHAPES[:1], (bf16,), (silu,), ("gate up down",))
    some += product((16, 32), SHAPES[:1], (bf16,), others, ("gate up down",))
    some += product((16,), SHAPES[:1], (bf16,), (silu,), list(ADAPTED)[1:])
    return [
        Case(f"r={rank} T={t} I={i} {dtype} {act} {name}", _call(rank, t, i, dtype, act, ADAPTED[name]), (8, 0))
        for rank, (t, i), dtype, act, name in some
    ]
