"""Dropout masks that come from a counter: the backward draws them again, nothing is stored.

    keep[t, k] = bits[t, k] >= threshold            16 bits of Philox4x32-7 at counter (k / 8, t, stream, draw)

`rng` is a device tensor [seed, draw]: a captured graph reads what it holds at each replay, so that `advance` makes new
masks. `stream` tells apart what draws at the same time: each adapter of each layer has its own, as PEFT gives each a
dropout module. Masks depend on nothing else, neither on tiles nor on the GPU.

Shapes: T tokens, K features. Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011); there 7 rounds
are the fewest that pass BigCrush.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.ops._philox import halves_of, words_of
from pyralis.ops._triton import (
    at_least_float32,
    cdiv,
    launch,
    next_power_of_2,
    store_as,
    tl,
    triton,
    unsupported_tensors,
)

LEVELS = 1 << 16


def new_rng(seed: int, device: torch.device) -> Tensor:
    """[seed, draw] int64, draw 0."""
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def advance(rng: Tensor) -> None:
    """New masks from here on. On the device, in stream order: it may be captured in a graph."""
    rng[1:].add_(1)


def reference(rng: Tensor, stream: int, rows: int, features: int, threshold: int) -> Tensor:
    """keep [rows, features] bool: Philox in 64-bit integers."""
    seed, draw = rng[0], rng[1] & 0xFFFFFFFF
    blocks = torch.arange(cdiv(features, 8), device=rng.device)
    counter = (blocks, torch.arange(rows, device=rng.device)[:, None], torch.full_like(draw, stream), draw)
    return halves_of(seed, counter).flatten(-2)[:, :features] >= threshold


def masked(
    x: Tensor, rng: Tensor, stream: int, threshold: int, out: Tensor, *, scale: float = 1.0, add: bool = False
) -> Tensor:
    """out = scale * keep * x, or with `add` out += it; x and out [T, K] of any row stride, and may be the same."""
    T, K = x.shape
    if unsupported_tensors(x, out) is not None:
        value = torch.where(reference(rng, stream, T, K, threshold), x, 0).to(at_least_float32(x.dtype)) * scale
        return out.add_(value) if add else out.copy_(value)
    block_k = min(max(next_power_of_2(K), 8), 256)
    block_t = 4096 // block_k
    launch(
        _masked_kernel, (cdiv(T, block_t), cdiv(K, block_k)),
        x, rng, out, T, x.stride(0), out.stride(0), stream, threshold, scale,
        device=x.device, num_warps=8, K=K, BLOCK_T=block_t, BLOCK_K=block_k, ADD=add,
    )  # fmt: skip
    return out


@triton.jit
def keep_tile(seed, draw, stream, threshold, row, first, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep [BLOCK_T, BLOCK_K] of rows `row` and columns from `first` (a multiple of 8) on."""
    c0 = tl.zeros([BLOCK_T, BLOCK_K // 8], tl.uint32) + (first // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)[None, :]
    c1 = tl.zeros([BLOCK_T, BLOCK_K // 8], tl.uint32) + row.to(tl.uint32)[:, None]
    c2 = tl.zeros([BLOCK_T, BLOCK_K // 8], tl.uint32) + stream.to(tl.uint32)
    c3 = tl.zeros([BLOCK_T, BLOCK_K // 8], tl.uint32) + draw.to(tl.uint32)
    c0, c1, c2, c3 = words_of(seed, c0, c1, c2, c3)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # order of the last two dimensions: c0 c1, c2 c3 row by row
    halves = tl.join(words << 16, words)  # each in its upper 16 bits: what is below changes no comparison
    return tl.reshape(halves, [BLOCK_T, BLOCK_K]) >= (threshold.to(tl.uint32) << 16)


@triton.jit(do_not_specialize=["T", "stream", "threshold"])
def _masked_kernel(
    x, rng, out, T, x_stride, out_stride, stream, threshold, scale,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * BLOCK_K
    col = first + tl.arange(0, BLOCK_K)
    mask = (row < T)[:, None] & (col < K)[None, :]
    keep = keep_tile(tl.load(rng), tl.load(rng + 1), stream, threshold, row, first, BLOCK_T, BLOCK_K)
    value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.where(keep, value * scale, 0.0)
    at = out + row[:, None] * out_stride + col[None, :]
    if ADD:
        value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    store_as(at, value, mask)
