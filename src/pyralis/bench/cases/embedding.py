"""Embedding rows from the GPU and from pinned host memory, and the gradient of a trained table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyralis.bench.case import PYRALIS, STOCK, BenchCase, Contender, ModelShape, backward_of
from pyralis.ops.embedding import embedding_backward, embedding_forward

DTYPE = torch.bfloat16


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    V, N = shape.vocab, shape.hidden

    def inputs(device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.randint(0, V, (tokens,), device=device), torch.randn((V, N), dtype=DTYPE, device=device)

    def forward(device: torch.device) -> dict[str, Contender]:
        ids, table = inputs(device)
        out = torch.empty((tokens, N), dtype=DTYPE, device=device)
        return {
            PYRALIS: lambda: embedding_forward(ids, table, out=out),
            STOCK: lambda: F.embedding(ids, table),
        }

    def from_host(device: torch.device) -> dict[str, Contender]:
        ids, table = inputs(device)
        out = torch.empty((tokens, N), dtype=DTYPE, device=device)
        host = table.cpu().pin_memory() if device.type == "cuda" else table
        return {
            PYRALIS: lambda: embedding_forward(ids, host, out=out),
            STOCK: lambda: F.embedding(ids.cpu(), host).to(device),
        }

    def backward(device: torch.device) -> dict[str, Contender]:
        ids, table = inputs(device)
        dy = torch.randn((tokens, N), dtype=DTYPE, device=device)
        dtable = torch.empty_like(table)

        def ours() -> Tensor:
            embedding_backward(dy, ids, dtable)
            return dtable

        return {PYRALIS: ours, STOCK: backward_of(lambda table: F.embedding(ids, table), (table,), dy)}

    moved = 2 * tokens * N * DTYPE.itemsize
    return [
        BenchCase("embedding", shape.name, tokens, forward, moved),
        BenchCase("embedding from host memory", shape.name, tokens, from_host, moved),
        BenchCase("embedding, backward", shape.name, tokens, backward, moved + V * N * DTYPE.itemsize),
    ]
