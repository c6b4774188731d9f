"""The kernels of `glu_lora.py`, with `tl.dot`. Shapes: T tokens, SIZE intermediate features, RANK of each adapter.

Products take the values that are stored: rounded to the dtype, as separate kernels would read them again.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from pyralis.ops._triton import round_to, store_as, tl, triton
from pyralis.ops.glu import activate_tile
from pyralis.ops.lora_dropout_kernels import A_tile, columns_tile, operand


@triton.jit
def _tile(at, row, stride, col, inside):
    return tl.load(at + row[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _anchored(x, inside):
    """x, which is zero outside already. Without this a product's operand would be computed from loads in the layout
    that the product wants, once more for each product: the compiler does not move a layout over what has no load."""
    return tl.where(inside, x, 0.0)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return round_to(x, dtype).to(dtype)


@triton.jit
def _stored(at, row, stride, col, inside, value):
    """float32 `value`, rounded and stored; what a product takes of it."""
    rounded = _rounded(value, at.dtype.element_ty)
    tl.store(at + row[:, None] * stride + col[None, :], rounded, mask=inside)
    return operand(rounded)


@triton.jit
def _B_tile(
    B, feature, stride, SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """[features, BLOCK_R]"""
    r = tl.arange(0, BLOCK_R)
    at = B + feature[:, None].to(tl.int64) * stride + r[None, :]
    if EVEN and RANK == BLOCK_R:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(feature < SIZE)[:, None] & (r < RANK)[None, :], other=0.0)
    return operand(tile)


@triton.jit
def _store_rows(at, row, rows, value, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """value [rows, BLOCK_R] into float32 [rows, RANK] at `at`."""
    r = tl.arange(0, BLOCK_R)
    tl.store(at + row[:, None] * RANK + r[None, :], value, mask=(row < rows)[:, None] & (r < RANK)[None, :])


@triton.jit
def _tile_backward(
    dh, gate, B_gate, B_up, row, T, feature, dh_stride, stride, B_stride, x_gate, x_up, t_down,
    t_gate, t_up, dB_gate, dB_up, dA,
    SIZE: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dgate and dup of a tile; returns the five sums with its share. EVEN: no feature is outside (masks take
    registers)."""
    inside = (row < T)[:, None]
    if not EVEN:
        inside = inside & (feature < SIZE)[None, :]
    up = gate + SIZE
    d = _tile(dh, row, dh_stride, feature, inside)
    g = _anchored(_tile(gate, row, stride, feature, inside), inside)
    u = _tile(up, row, stride, feature, inside)
    value, slope = activate_tile(g, ACTIVATION)
    dgate = _stored(gate, row, stride, feature, inside, d * u * slope)
    dup = _stored(up, row, stride, feature, inside, d * value)
    if t_down is not None:
        dtype: tl.constexpr = gate.dtype.element_ty
        dA += tl.dot(tl.trans(operand(_rounded(round_to(value, dtype) * u, dtype))), t_down)
    if x_gate is not None:  # B is loaded again and again: what a loop does not change is kept in registers
        t_gate += tl.dot(dgate, _B_tile(B_gate, feature, B_stride, SIZE, RANK, BLOCK_R, EVEN))
        dB_gate += tl.dot(tl.trans(dgate), x_gate)
    if x_up is not None:
        t_up += tl.dot(dup, _B_tile(B_up, feature, B_stride, SIZE, RANK, BLOCK_R, EVEN))
        dB_up += tl.dot(tl.trans(dup), x_up)
    return t_gate, t_up, dB_gate, dB_up, dA


@triton.jit(do_not_specialize=["T", "span"])
def glu_lora_backward_kernel(
    dh, gate, B_gate, B_up, xa, t_down, t_parts, dB_parts, dA_parts, T, span,
    dh_stride, stride, B_stride, xa_stride, t_stride,
    SIZE: tl.constexpr, RANK: tl.constexpr, UP_COLUMN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A strip of one or two tiles of features, and a span of tokens. None: B_gate, B_up without an adapter there, and
    t_down without down's.

    up lies behind gate in rows `stride` apart. Parts of t and dB are laid out as `lora_grad_b` adds them up, gate's and
    then up's; those of dA are [splits, RANK, SIZE].
    """
    GATE: tl.constexpr = B_gate is not None
    UP: tl.constexpr = B_up is not None
    DOWN: tl.constexpr = t_down is not None
    EVEN: tl.constexpr = SIZE % (BLOCK_N * TILES) == 0
    strip, split = tl.program_id(0), tl.program_id(1)
    feature0 = strip * TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    feature1 = feature0 + BLOCK_N
    up_strip = strip + (tl.num_programs(0) if GATE else 0)
    dB_gate0 = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    dB_up0, dA0, dB_gate1, dB_up1, dA1 = dB_gate0, dB_gate0, dB_gate0, dB_gate0, dB_gate0
    for token in range(split * span, min(T, (split + 1) * span), BLOCK_T):
        row = tl.arange(0, BLOCK_T).to(tl.int64) + token
        x_gate = columns_tile(xa, row, T, xa_stride, 0, RANK, BLOCK_R) if GATE else None
        x_up = columns_tile(xa, row, T, xa_stride, UP_COLUMN, RANK, BLOCK_R) if UP else None
        t_tile = columns_tile(t_down, row, T, t_stride, 0, RANK, BLOCK_R) if DOWN else None
        t_gate = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        t_gate, t_up, dB_gate0, dB_up0, dA0 = _tile_backward(
            dh, gate, B_gate, B_up, row, T, feature0, dh_stride, stride, B_stride, x_gate, x_up, t_tile,
            t_gate, t_gate, dB_gate0, dB_up0, dA0, SIZE, RANK, ACTIVATION, BLOCK_R, EVEN,
        )  # fmt: skip
        if TILES > 1:
            t_gate, t_up, dB_gate1, dB_up1, dA1 = _tile_backward(
                dh, gate, B_gate, B_up, row, T, feature1, dh_stride, stride, B_stride, x_gate, x_up, t_tile,
                t_gate, t_up, dB_gate1, dB_up1, dA1, SIZE, RANK, ACTIVATION, BLOCK_R, EVEN,
            )  # fmt: skip
        if GATE:
            _store_rows(t_parts + strip * T.to(tl.int64) * RANK, row, T, t_gate, RANK, BLOCK_R)
        if UP:
            _store_rows(t_parts + up_strip * T.to(tl.int64) * RANK, row, T, t_up, RANK, BLOCK_R)
    split = split.to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    for tile in tl.static_range(TILES):
        feature = feature1 if tile else feature0
        if GATE:
            at = dB_parts + split * ((1 + UP) * SIZE * RANK)
            _store_rows(at, feature, SIZE, dB_gate1 if tile else dB_gate0, RANK, BLOCK_R)
        if UP:
            at = dB_parts + (split * (1 + GATE) + GATE) * (SIZE * RANK)
            _store_rows(at, feature, SIZE, dB_up1 if tile else dB_up0, RANK, BLOCK_R)
        if DOWN:  # transposed: products of many rows are spread over warps
            at = dA_parts + split * (RANK * SIZE) + r[None, :] * SIZE + feature[:, None]
            tl.store(at, dA1 if tile else dA0, mask=(feature < SIZE)[:, None] & (r < RANK)[None, :])


@triton.jit(do_not_specialize=["T", "span"])
def glu_lora_forward_kernel(
    gate, A, out, partial, T, span, stride, A_stride, out_stride, alpha,
    SIZE: tl.constexpr, RANK: tl.constexpr, PAD: tl.constexpr, BLOCK_P: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A block of tokens and `span` blocks of features: h, and what of xa they yield, without `partial` all of it."""
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    up = gate + SIZE
    xa = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for block in range(split * span, min(tl.cdiv(SIZE, BLOCK_N), (split + 1) * span)):
        feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < T)[:, None] & (feature < SIZE)[None, :]
        g = _anchored(_tile(gate, row, stride, feature, inside), inside)
        u = _tile(up, row, stride, feature, inside)
        value, _ = activate_tile(g, ACTIVATION)
        h = _stored(out, row, out_stride, feature, inside, round_to(value, gate.dtype.element_ty) * u)
        xa += tl.dot(h, tl.trans(A_tile(A, feature, A_stride, 0, SIZE, RANK, BLOCK_R)))
    r = tl.arange(0, BLOCK_R)
    at = out + row[:, None] * out_stride + SIZE
    if partial is None:
        store_as(at + r[None, :], xa * alpha, (row < T)[:, None] & (r < RANK)[None, :])
    else:
        _store_rows(partial + split * T.to(tl.int64) * RANK, row, T, xa, RANK, BLOCK_R)
    if PAD > 0 and split == 0:
        extra = tl.arange(0, BLOCK_P)
        zeros = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
        store_as(at + RANK + extra[None, :], zeros, (row < T)[:, None] & (extra < PAD)[None, :])
