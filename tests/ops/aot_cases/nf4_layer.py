"""Launches of nf4_layer to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from aot_cases.nf4 import matrix

from pyralis.ops.nf4_layer import dequantize_layer
from pyralis.ops.nf4_plan import Copy, LayerPlan, Placement
from tests.ops.aot import Case, meta

LAYERS = {  # rows and columns of q, k, v, o, gate, up, down
    "llama3-8b": ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)),
    "qwen2-7b": ((3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18944, 3584), (18944, 3584), (3584, 18944)),
    "odd": ((40, 100), (8, 33)),
}


def _call(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, wide: int, lora: torch.dtype | None, nested: Sequence[bool]
) -> Callable[[], None]:
    def call() -> None:
        rows = 8 if wide else 0
        arena = meta(sum((n + rows) * (k + wide) for n, k in shapes), dtype=dtype)
        placements, copies, start = [], [], 0
        for i, (n, k) in enumerate(shapes):
            matrices = arena[start : start + (n + rows) * (k + wide)].view(-1, k + wide)
            out = matrices[:n]
            start += matrices.numel()
            if rows:
                copies.append(Copy(meta(rows, k, dtype=dtype), matrices[n:, :k]))
            B = None if lora is None else meta(n, min(16, wide), dtype=lora)
            placements.append(Placement(matrix(n, k, nested=nested[i % len(nested)]), out, B))
        dequantize_layer(LayerPlan.of(placements, arena, copies), arena)

    return call


def cases() -> list[Case]:
    variants = (
        (torch.bfloat16, 64, torch.float32, (True,)),
        (torch.bfloat16, 0, None, (True,)),
        (torch.float16, 64, torch.float16, (True, False)),
        (torch.float32, 3, torch.float32, (False,)),
        (torch.bfloat16, 256, None, (False, True)),
    )
    return [
        Case(f"{name} {dtype} P={wide} B={lora} nested={nested}", _call(shapes, dtype, wide, lora, nested))
        for name, shapes in LAYERS.items()
        for dtype, wide, lora, nested in variants
    ]
