"""The kernels of rope.py: a program takes one token and HEADS heads of q or of k, or in the backward V_HEADS of v.

A tile of heads is three: the first and the second half of the rotated columns, and the rest that passes through. A tile
of v's gradient, which is only copied, is one.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pyralis.ops._triton import next_power_of_2, round_to, store_as, tl, triton, warps_for


@dataclass(frozen=True, slots=True)
class HeadLaunch:
    """A program takes one token and a few heads of q or of k."""

    heads: int  # heads of a tile
    block_half: int  # columns of half the rotated part, a power of two
    num_warps: int

    @classmethod
    @cache
    def of(cls, heads: int, rotated: int) -> HeadLaunch:
        block_half = next_power_of_2(rotated // 2)
        tile_heads = min(next_power_of_2(heads), max(1, 1024 // block_half))
        # Eight elements a thread of either half: two 16-byte loads in flight each.
        return cls(tile_heads, block_half, warps_for(tile_heads * block_half, per_thread=8))

    def copied_heads(self, heads: int, head_size: int) -> int:
        """Heads of v that a program copies, a power of two: at most sixteen elements a thread, as q's and k's have."""
        return min(next_power_of_2(heads), max(1, 512 * self.num_warps // next_power_of_2(head_size)))


@triton.jit
def _table_row(cos, sin, positions, token, cos_stride, sin_stride, table_rows, R: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin [1, R / 2] of a token, float32."""
    if positions is not None:
        row = tl.load(positions + token).to(tl.int64)
    else:
        row = (token % table_rows).to(tl.int64)  # token is int32 here: a 64-bit remainder is a hundred instructions
    col = tl.arange(0, BLOCK)
    c = tl.load(cos + row * cos_stride + col, mask=col < R // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + row * sin_stride + col, mask=col < R // 2, other=0.0).to(tl.float32)
    return c[None, :], s[None, :]


@triton.jit
def _weight_part(weight, first: tl.constexpr, count: tl.constexpr, BLOCK: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """[1, BLOCK] of the norm's weight from column `first`, float32, with Gemma's 1 in it."""
    col = tl.arange(0, BLOCK)
    w = tl.load(weight + first + col, mask=col < count, other=0.0).to(tl.float32)[None, :]
    if UNIT_OFFSET:
        w += 1.0
    return w


@triton.jit
def _scaled(x, rstd, w, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """The norm's output, rounded as rms_norm rounds it."""
    n = x * rstd
    if not UNIT_OFFSET:
        n = round_to(n, dtype)
    return round_to(n * w, dtype)


@triton.jit
def _forward_heads(
    x, out, weight, rstd_out, c, s, token, first_head, stride, head_stride, out_stride, out_head_stride, eps,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, COPY_REST: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = R // 2
    head = first_head + tl.arange(0, HEADS)
    col = tl.arange(0, BLOCK_HALF)
    rest = tl.arange(0, BLOCK_REST)
    mask = (head < H)[:, None] & (col < HALF)[None, :]
    mask_rest = (head < H)[:, None] & (rest < D - R)[None, :]
    source = x + token * stride + head[:, None] * head_stride
    target = out + token * out_stride + head[:, None] * out_head_stride
    a = tl.load(source + col[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if R < D and COPY_REST:
        z = tl.load(source + R + rest[None, :], mask=mask_rest, other=0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if R < D:
            squares += tl.sum(z * z, 1)
        rstd = tl.rsqrt(squares / D + eps)
        tl.store(rstd_out + token * H + head, rstd, mask=head < H)
        a = _scaled(a, rstd[:, None], _weight_part(weight, 0, HALF, BLOCK_HALF, UNIT_OFFSET), dtype, UNIT_OFFSET)
        b = _scaled(b, rstd[:, None], _weight_part(weight, HALF, HALF, BLOCK_HALF, UNIT_OFFSET), dtype, UNIT_OFFSET)
        if R < D:
            z = _scaled(z, rstd[:, None], _weight_part(weight, R, D - R, BLOCK_REST, UNIT_OFFSET), dtype, UNIT_OFFSET)
    store_as(target + col[None, :], a * c - b * s, mask)
    store_as(target + HALF + col[None, :], b * c + a * s, mask)
    if R < D and COPY_REST:
        store_as(target + R + rest[None, :], z, mask_rest)


@triton.jit(do_not_specialize=["table_rows"])
def forward_kernel(
    q, k, q_out, k_out, cos, sin, positions, q_weight, k_weight, q_rstd, k_rstd,
    q_stride, q_head_stride, k_stride, k_head_stride, q_out_stride, q_out_head_stride, k_out_stride, k_out_head_stride,
    cos_stride, sin_stride, table_rows, eps,
    Q_BLOCKS: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, COPY_REST: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    block = tl.program_id(1)
    c, s = _table_row(cos, sin, positions, token, cos_stride, sin_stride, table_rows, R, BLOCK_HALF)
    token = token.to(tl.int64)
    if block < Q_BLOCKS:
        _forward_heads(
            q, q_out, q_weight, q_rstd, c, s, token, block * HEADS,
            q_stride, q_head_stride, q_out_stride, q_out_head_stride, eps,
            HQ, HEADS, D, R, BLOCK_HALF, BLOCK_REST, COPY_REST, UNIT_OFFSET,
        )  # fmt: skip
    else:
        _forward_heads(
            k, k_out, k_weight, k_rstd, c, s, token, (block - Q_BLOCKS) * HEADS,
            k_stride, k_head_stride, k_out_stride, k_out_head_stride, eps,
            HK, HEADS, D, R, BLOCK_HALF, BLOCK_REST, COPY_REST, UNIT_OFFSET,
        )  # fmt: skip


@triton.jit
def _backward_heads(
    grad, out, x, weight, rstd_in, partial, c, s, token, first_head, stride, head_stride, out_stride, out_head_stride,
    x_stride, x_head_stride, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, COPY_REST: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = R // 2
    head = first_head + tl.arange(0, HEADS)
    col = tl.arange(0, BLOCK_HALF)
    mask = (head < H)[:, None] & (col < HALF)[None, :]
    given = grad + token * stride + head[:, None] * head_stride
    target = out + token * out_stride + head[:, None] * out_head_stride
    ga = tl.load(given + col[None, :], mask=mask, other=0.0).to(tl.float32)
    gb = tl.load(given + HALF + col[None, :], mask=mask, other=0.0).to(tl.float32)
    da = ga * c + gb * s
    db = gb * c - ga * s
    rest = tl.arange(0, BLOCK_REST)
    mask_rest = (head < H)[:, None] & (rest < D - R)[None, :]
    if R < D and COPY_REST:
        dz = tl.load(given + R + rest[None, :], mask=mask_rest, other=0.0).to(tl.float32)
    if weight is not None:
        source = x + token * x_stride + head[:, None] * x_head_stride
        rstd = tl.load(rstd_in + token * H + head, mask=head < H, other=0.0)[:, None]
        a = tl.load(source + col[None, :], mask=mask, other=0.0).to(tl.float32) * rstd
        b = tl.load(source + HALF + col[None, :], mask=mask, other=0.0).to(tl.float32) * rstd
        if partial is not None:
            tl.store(partial + col, tl.sum(da * a, 0), mask=col < HALF)
            tl.store(partial + HALF + col, tl.sum(db * b, 0), mask=col < HALF)
        da *= _weight_part(weight, 0, HALF, BLOCK_HALF, UNIT_OFFSET)
        db *= _weight_part(weight, HALF, HALF, BLOCK_HALF, UNIT_OFFSET)
        dot = tl.sum(da * a, 1) + tl.sum(db * b, 1)
        if R < D:
            z = tl.load(source + R + rest[None, :], mask=mask_rest, other=0.0).to(tl.float32) * rstd
            if partial is not None:
                tl.store(partial + R + rest, tl.sum(dz * z, 0), mask=rest < D - R)
            dz *= _weight_part(weight, R, D - R, BLOCK_REST, UNIT_OFFSET)
            dot += tl.sum(dz * z, 1)
            dz = rstd * (dz - z * (dot / D)[:, None])
        da = rstd * (da - a * (dot / D)[:, None])
        db = rstd * (db - b * (dot / D)[:, None])
    store_as(target + col[None, :], da, mask)
    store_as(target + HALF + col[None, :], db, mask)
    if R < D and COPY_REST:
        store_as(target + R + rest[None, :], dz, mask_rest)


@triton.jit
def _copy_heads(
    x, out, token, first_head, stride, head_stride, out_stride, out_head_stride,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (head < H) & (col < D)
    values = tl.load(x + token * stride + head * head_stride + col, mask=mask)
    tl.store(out + token * out_stride + head * out_head_stride + col, values, mask=mask)


@triton.jit(do_not_specialize=["table_rows"])
def backward_kernel(
    dq, dk, dv, dq_out, dk_out, dv_out, q, k, cos, sin, positions, q_weight, k_weight, q_rstd, k_rstd, partial,
    dq_stride, dq_head_stride, dk_stride, dk_head_stride, dq_out_stride, dq_out_head_stride, dk_out_stride,
    dk_out_head_stride, q_stride, q_head_stride, k_stride, k_head_stride, dv_stride, dv_head_stride, dv_out_stride,
    dv_out_head_stride, cos_stride, sin_stride, table_rows,
    Q_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HEADS: tl.constexpr,
    V_HEADS: tl.constexpr, BLOCK_V: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, COPY_REST: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    block = tl.program_id(1)
    if dv is not None:  # noqa: SIM102  (decided when the kernel is compiled)
        if block >= BLOCKS:
            _copy_heads(
                dv, dv_out, token.to(tl.int64), (block - BLOCKS) * V_HEADS,
                dv_stride, dv_head_stride, dv_out_stride, dv_out_head_stride, HK, V_HEADS, D, BLOCK_V,
            )  # fmt: skip
            return
    c, s = _table_row(cos, sin, positions, token, cos_stride, sin_stride, table_rows, R, BLOCK_HALF)
    token = token.to(tl.int64)
    if partial is not None:
        partial += (token * BLOCKS + block) * D
    if block < Q_BLOCKS:
        _backward_heads(
            dq, dq_out, q, q_weight, q_rstd, partial, c, s, token, block * HEADS,
            dq_stride, dq_head_stride, dq_out_stride, dq_out_head_stride, q_stride, q_head_stride,
            HQ, HEADS, D, R, BLOCK_HALF, BLOCK_REST, COPY_REST, UNIT_OFFSET,
        )  # fmt: skip
    else:
        _backward_heads(
            dk, dk_out, k, k_weight, k_rstd, partial, c, s, token, (block - Q_BLOCKS) * HEADS,
            dk_stride, dk_head_stride, dk_out_stride, dk_out_head_stride, k_stride, k_head_stride,
            HK, HEADS, D, R, BLOCK_HALF, BLOCK_REST, COPY_REST, UNIT_OFFSET,
        )  # fmt: skip
