"""Philox4x32-7: random bits from a counter, the same in a kernel and in torch.

Element e of a flat buffer owns 16 bits: half e % 2 (low first) of word (e % 8) / 2 of the counter
(e / 8 mod 2^32, e / 2^35, draw, 0) under a 64-bit seed. So bits depend on the seed, the draw and the element only.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011); 7 rounds are the fewest that pass BigCrush.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, tl, triton

ROUNDS = 7
_ROUNDS = tl.constexpr(ROUNDS)
_LOW = 0xFFFFFFFF


def random_halves(seed: Tensor, draw: Tensor, n: int, first: int = 0) -> Tensor:
    """[n] int32 in [0, 2^16): the bits of elements first to first + n, first a multiple of 8.

    seed, draw: integer tensors of one element.
    """
    block = torch.arange(first // 8, first // 8 + cdiv(n, 8), dtype=torch.int64, device=seed.device)
    seed, draw = seed.reshape(()).long(), draw.reshape(()).long() & _LOW
    counter = (block & _LOW, block >> 32, draw.expand_as(block), torch.zeros_like(block))
    return halves_of(seed, counter).flatten()[:n].int()


def halves_of(seed: Tensor, counter: Sequence[Tensor]) -> Tensor:
    """[..., 8] int64 in [0, 2^16): the halves of the four words of each counter, low ones first.

    seed: a 64-bit integer; counter: four tensors of 32-bit integers that broadcast to [...].
    """
    c = list(counter)
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(ROUNDS):
        (high0, low0), (high2, low2) = _product(c[0], 0xD2511F53), _product(c[2], 0xCD9E8D57)
        c = [high2 ^ c[1] ^ key[0], low2, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    words = torch.stack(torch.broadcast_tensors(*c), -1)
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-2)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of the product of two 32-bit values, in 64-bit integers that never overflow."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _LOW


@triton.jit
def _times(a, b: tl.constexpr):
    """(high, low) 32 bits of a product, by one instruction."""
    wide = a.to(tl.uint64) * b
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def words_of(seed, c0, c1, c2, c3):
    """The four words of counters (c0, c1, c2, c3), uint32 tensors of one shape, under a 64-bit seed."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = _times(c0, 0xD2511F53)
        high2, low2 = _times(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def random_halves_of(seed, draw, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] uint32 in [0, 2^16): the bits of rows `block` [ROWS] (int64) of COLUMNS elements each."""
    counter = block[:, None] * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = words_of(seed, low, (counter >> 32).to(tl.uint32), zero + draw.to(tl.uint32), zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, COLUMNS])
