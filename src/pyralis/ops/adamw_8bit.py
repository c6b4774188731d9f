"""AdamW's states in 8 bits: a code for each element, a scale for each block of 256.

    scale = max |x| over the block,  code = the nearest entry of a map to x * (1 / scale),  x' = map[code] * scale

The maps are bitsandbytes' dynamic ones (`create_dynamic_map`), signed for the first moment and unsigned for the second,
so states can be handed over in either direction. With K = 1 for the signed map's positive half and K = 2 for the
unsigned map, the entries above 0 are, for decades i = 0..6,

    10^(i - 6) * (0.1 + 0.9 * (k + 1/2) / (K 2^i)),  k < K 2^i,      and 1

Within a decade they are equally spaced, so an entry's rank is a linear function of x there; the slopes fall by 5 from
decade to decade, so the rank is the least of the seven lines. That places x within one entry, and the midpoint between
the two candidates decides: one table look-up where a binary search needs eight. The code is the nearest one, always
(a tie goes to the smaller magnitude).

Shapes: n elements, B = ceil(n / 256) blocks. Source of the format: Dettmers et al., 8-bit Optimizers via Block-wise
Quantization (2022).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, tl, triton

BLOCK = 256
_SIGNED, _UNSIGNED, _SIGNED_MIDDLES, _UNSIGNED_MIDDLES, _END = 0, 256, 512, 640, 896  # where tables start
_ZERO = 127  # the signed map's code of 0
_SMALLEST = 2.0**-126  # float32's smallest normal number: a block below it counts as zeros, its 1 / scale may overflow
SMALLEST = tl.constexpr(_SMALLEST)
SIGNED = tl.constexpr(_SIGNED)
UNSIGNED = tl.constexpr(_UNSIGNED)
SIGNED_MIDDLES = tl.constexpr(_SIGNED_MIDDLES)
UNSIGNED_MIDDLES = tl.constexpr(_UNSIGNED_MIDDLES)


@lru_cache
def code_tables(device: torch.device) -> Tensor:
    """[896] float32: signed map, unsigned map, and the midpoints between neighbours of each at and above 0."""
    from bitsandbytes.functional import create_dynamic_map

    signed, unsigned = (create_dynamic_map(signed=s).float().cpu() for s in (True, False))
    middles = [((half[:-1].double() + half[1:].double()) / 2).float() for half in (signed[127:], unsigned)]
    tables = torch.full((_END,), float("inf"))
    starts = (_SIGNED, _UNSIGNED, _SIGNED_MIDDLES, _UNSIGNED_MIDDLES)
    for start, table in zip(starts, (signed, unsigned, *middles)):
        tables[start : start + len(table)] = table
    return tables.to(device)


def to_blocks(x: Tensor) -> Tensor:
    """[n] -> [B, 256], padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def quantise(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes [n] uint8, scales [B] float32) of a flat float32 buffer; the readable reference of the kernel's."""
    tables = code_tables(x.device)
    blocks = to_blocks(x)
    scale = blocks.abs().amax(1)
    magnitude = blocks.abs() * torch.where(scale >= _SMALLEST, scale, float("inf")).reciprocal()[:, None]
    if signed:
        rank = torch.bucketize(magnitude, tables[_SIGNED_MIDDLES:_UNSIGNED_MIDDLES])
        codes = torch.where(blocks < 0, 127 - rank.clamp(max=127), 127 + rank)
    else:
        codes = torch.bucketize(magnitude, tables[_UNSIGNED_MIDDLES : _UNSIGNED_MIDDLES + 255])
    return codes.to(torch.uint8).flatten()[: x.numel()], scale


def dequantise(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """[n] float32."""
    start = _SIGNED if signed else _UNSIGNED
    values = code_tables(codes.device)[start : start + 256][codes.int()]
    return (to_blocks(values) * scale[:, None]).flatten()[: codes.numel()]


@dataclass(frozen=True, slots=True)
class State8bit:
    """First and second moments in 8 bits, except for the blocks that `slots` sends to the float32 buffers."""

    m_codes: Tensor  # [n] uint8
    v_codes: Tensor  # [n] uint8
    m_scale: Tensor  # [B] float32
    v_scale: Tensor  # [B] float32
    tables: Tensor  # [896] float32
    slots: Tensor | None = None  # [B] int32: which block of m and v holds this one in float32; -1 for 8 bits
    m: Tensor | None = None  # [W * 256] float32, for W blocks kept wide
    v: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        n: int,
        device: torch.device | str,
        wide: Tensor | None = None,
        *,
        allocate: Callable[..., Tensor] = torch.zeros,
    ) -> State8bit:
        """wide: [B] bool, on the CPU: blocks kept in float32 (of small parameters: bitsandbytes' `min_8bit_size`).
        allocate: what `torch.zeros` is called for where it is of the size of the parameters."""
        device = torch.device(device)
        m_codes, v_codes = (allocate(n, dtype=torch.uint8, device=device) for _ in range(2))
        m_codes.fill_(_ZERO)  # also of what lies between parameters, which no checkpoint holds: 0 would stand for -1
        m_scale, v_scale = (torch.zeros(cdiv(n, BLOCK), device=device) for _ in range(2))
        narrow = cls(m_codes, v_codes, m_scale, v_scale, code_tables(device))
        if wide is None or not bool(wide.any()):
            return narrow
        slots = torch.where(wide, wide.int().cumsum(0) - 1, -1).to(device, torch.int32)
        held = int(wide.sum()) * BLOCK
        m, v = (allocate(held, dtype=torch.float32, device=device) for _ in range(2))
        return replace(narrow, slots=slots, m=m, v=v)

    def part(self, elements: slice, blocks: slice) -> State8bit:
        """Views of these elements, which are those of these blocks; the float32 buffers are shared."""
        return replace(
            self, m_codes=self.m_codes[elements], v_codes=self.v_codes[elements],
            m_scale=self.m_scale[blocks], v_scale=self.v_scale[blocks],
            slots=None if self.slots is None else self.slots[blocks],
        )  # fmt: skip

    def moments(self) -> tuple[Tensor, Tensor]:
        """(m, v), both [n] float32."""
        m = dequantise(self.m_codes, self.m_scale, signed=True)
        v = dequantise(self.v_codes, self.v_scale, signed=False)
        if self.slots is not None and self.m is not None and self.v is not None:
            narrow, kept = (self.slots < 0)[:, None], self.slots.clamp(min=0)
            m = torch.where(narrow, to_blocks(m), self.m.view(-1, BLOCK)[kept]).flatten()[: len(m)]
            v = torch.where(narrow, to_blocks(v), self.v.view(-1, BLOCK)[kept]).flatten()[: len(v)]
        return m, v

    def store(self, m: Tensor, v: Tensor, keep: Tensor) -> None:
        """Take over m and v [n] float32 in the blocks where `keep` [B] is False; the others stay as they are."""
        for x, codes, scale, wide, signed in (
            (m, self.m_codes, self.m_scale, self.m, True),
            (v, self.v_codes, self.v_scale, self.v, False),
        ):
            narrow = ~keep
            if self.slots is not None and wide is not None:
                narrow = narrow & (self.slots < 0)
                held = (self.slots >= 0).nonzero().flatten()
                slot = self.slots[held].long()
                old = wide.view(-1, BLOCK)[slot]
                wide.view(-1, BLOCK)[slot] = torch.where(keep[held, None], old, to_blocks(x)[held])
            new_codes, new_scale = quantise(x, signed=signed)
            chosen = torch.where(narrow[:, None], to_blocks(new_codes), to_blocks(codes))
            codes.copy_(chosen.flatten()[: len(codes)])
            scale.copy_(torch.where(narrow, new_scale, scale))


@triton.jit
def nearest_codes(x, scale, tables, IS_SIGNED: tl.constexpr):
    """Codes [ROWS, 256] of float32 x [ROWS, 256] in blocks of scale [ROWS]."""
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, tl.where(scale >= SMALLEST, scale, float("inf")))
    magnitude = tl.abs(x) * inverse[:, None]
    rank = magnitude * (1e6 / 0.9) - 1.0 / 9.0
    for decade in tl.static_range(1, 7):
        rank = tl.minimum(rank, magnitude * (1e6 / 0.9 / 5**decade) + (2**decade - 1 - 2**decade / 9.0))
    if IS_SIGNED:
        lower = tl.minimum(tl.maximum((rank + 0.5).to(tl.int32), 0), 127)  # NaN must not reach the table's index
        upper = (magnitude > tl.load(tables + SIGNED_MIDDLES + lower)).to(tl.int32)
        codes = tl.where(x < 0.0, 127 - tl.minimum(lower + upper, 127), 127 + lower + upper)
    else:
        lower = tl.minimum(tl.maximum((2.0 * rank + 0.5).to(tl.int32), 0), 254)
        codes = lower + (magnitude > tl.load(tables + UNSIGNED_MIDDLES + lower)).to(tl.int32)
    return codes.to(tl.uint8)
