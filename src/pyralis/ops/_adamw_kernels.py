"""The kernel of adamw.py: a program takes ROWS blocks of 256 elements through the whole update."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from pyralis.ops._philox import random_halves_of
from pyralis.ops._triton import round_to, store_as, tl, triton
from pyralis.ops.adamw_8bit import BLOCK, SIGNED, UNSIGNED, nearest_codes

_BLOCK = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["first_block"])
def adamw_kernel(
    parameters, grads, m_state, v_state, m_scale, v_scale, tables, slots, m_wide, v_wide,
    group_lr, group_decay, group_index, scalars, step, compute_copy, seed, low_bits,
    n, first_block, one_minus_beta1, beta2, one_minus_beta2, eps, EIGHT_BIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = at < n
    row_inside = block * _BLOCK < n
    p = tl.load(parameters + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    if EIGHT_BIT:
        scale1 = tl.load(m_scale + block, mask=row_inside, other=0.0)
        scale2 = tl.load(v_scale + block, mask=row_inside, other=0.0)
        m = tl.load(tables + SIGNED + tl.load(m_state + at, mask=inside, other=127).to(tl.int32)) * scale1[:, None]
        v = tl.load(tables + UNSIGNED + tl.load(v_state + at, mask=inside, other=0).to(tl.int32)) * scale2[:, None]
        if slots is not None:
            slot = tl.load(slots + block, mask=row_inside, other=-1).to(tl.int64)
            wide_at = slot[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
            is_wide = (slot >= 0)[:, None] & inside
            m = tl.where(is_wide, tl.load(m_wide + wide_at, mask=is_wide, other=0.0), m)
            v = tl.where(is_wide, tl.load(v_wide + wide_at, mask=is_wide, other=0.0), v)
    else:
        m = tl.load(m_state + at, mask=inside, other=0.0)
        v = tl.load(v_state + at, mask=inside, other=0.0)
    if low_bits is not None:
        low = tl.load(low_bits + at, mask=inside, other=0).to(tl.int32)
        p = (p.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)

    # Only the stores wait for the skip flag.
    row_live = row_inside & (tl.zeros([ROWS], tl.float32) + tl.load(scalars + 2) == 0.0)
    if group_index is None:
        lr = tl.load(group_lr)
        weight_decay = tl.load(group_decay)
        size = tl.div_rn(lr, tl.load(scalars + 3))
        decay = 1.0 - lr * weight_decay
    else:
        group = tl.load(group_index + block, mask=row_inside, other=-1)
        row_live = row_live & (group >= 0)
        lr = tl.load(group_lr + group, mask=group >= 0, other=0.0)
        weight_decay = tl.load(group_decay + group, mask=group >= 0, other=0.0)
        size = tl.div_rn(lr, tl.load(scalars + 3) + tl.zeros_like(lr))[:, None]
        decay = (1.0 - lr * weight_decay)[:, None]
    live = inside & row_live[:, None]

    g = g * tl.load(scalars + 1)
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + g * one_minus_beta2 * g
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(scalars + 4) + tl.zeros_like(v)) + eps
    p = p * decay - tl.div_rn(size * m, denominator)

    if seed is not None:
        halves = random_halves_of(tl.load(seed), tl.load(step), block + first_block, ROWS, _BLOCK)
        rounded = ((p.to(tl.uint32, bitcast=True) + halves) & 0xFFFF0000).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(p) < float("inf"), rounded, p)
    elif low_bits is not None:
        finite = tl.abs(p) < float("inf")
        bits = tl.where(finite, p, 0.0).to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) & -65536
        rounded = tl.where(finite, upper.to(tl.float32, bitcast=True), p)
        tl.store(low_bits + at, (bits - upper).to(tl.int16), mask=live)
    else:
        rounded = p
    store_as(parameters + at, rounded, live)
    if compute_copy is not None:
        rounded = round_to(rounded, parameters.dtype.element_ty)
        store_as(compute_copy + at, rounded, live)

    if EIGHT_BIT:
        m = tl.where(inside, m, 0.0)
        v = tl.where(inside, v, 0.0)
        if slots is not None:
            tl.store(m_wide + wide_at, m, mask=is_wide & live)
            tl.store(v_wide + wide_at, v, mask=is_wide & live)
            row_live = row_live & (slot < 0)
            live = live & (slot < 0)[:, None]
        scale1 = tl.max(tl.abs(m), 1)
        scale2 = tl.max(v, 1)
        tl.store(m_scale + block, scale1, mask=row_live)
        tl.store(v_scale + block, scale2, mask=row_live)
        tl.store(m_state + at, nearest_codes(m, scale1, tables, True), mask=live)
        tl.store(v_state + at, nearest_codes(v, scale2, tables, False), mask=live)
    else:
        tl.store(m_state + at, m, mask=live)
        tl.store(v_state + at, v, mask=live)
