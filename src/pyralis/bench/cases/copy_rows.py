"""Rows copied into rows with room for LoRA, as attention's output is."""

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.bench.case import COMPILED, PYRALIS, STOCK, BenchCase, Contender, ModelShape, compiled
from pyralis.ops.copy_rows import copy_rows, reference

ROOM = 64


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    features, dtype = shape.heads * shape.head_dim, torch.bfloat16

    def contenders(device: torch.device) -> dict[str, Contender]:
        x = torch.randn(tokens, features, dtype=dtype, device=device)

        def place() -> Tensor:
            return torch.empty((tokens, features + ROOM), dtype=dtype, device=device)[:, :features]

        ours, stock, made = place(), place(), place()
        return {
            PYRALIS: lambda: copy_rows(ours, x),
            STOCK: lambda: reference(stock, x),
            COMPILED: lambda: compiled(reference)(made, x),
        }

    return [BenchCase("copy into wide rows", shape.name, tokens, contenders, 2 * tokens * features * dtype.itemsize)]
