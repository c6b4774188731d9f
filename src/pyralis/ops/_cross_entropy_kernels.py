"""The kernel of cross_entropy.py: a program takes a row of logits, forward, backward or both, in blocks of columns."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from pyralis.ops._loss import IGNORE_INDEX
from pyralis.ops._triton import store_as, tl, triton

_IGNORE = tl.constexpr(IGNORE_INDEX)


@triton.jit
def _transform(x, logit_scale, softcap):
    """(z, dz/dx) of float32 x."""
    z = x * logit_scale
    slope = logit_scale
    if softcap is not None:
        u = z / softcap
        w = u * u
        e = tl.exp(-2.0 * tl.abs(u))
        r = 1.0 / (1.0 + e)
        # tanh |u| = 1 - 2 e r cancels near 0: there an odd polynomial, fitted to 3e-9 for |u| < 0.6
        series = 0.13331915 + w * (-0.05378329 + w * (0.02079462 - 0.00589395 * w))
        small = u + u * w * (-0.33333298 + w * series)
        large = tl.where(u < 0, 2.0 * e * r - 1.0, 1.0 - 2.0 * e * r)
        t = tl.where(tl.abs(u) < 0.6, small, large)
        z = softcap * t
        slope = logit_scale * tl.where(tl.abs(u) < 0.6, 1.0 - t * t, 4.0 * e * r * r)
    return z, slope


@triton.jit
def _absorb(z, m, s):
    """The running maximum m and sum s [BLOCK / VECTOR] with z [BLOCK / VECTOR, VECTOR] taken in: each thread keeps its
    own, so that the loop has no barrier and 1 + 1 / VECTOR exponentials an element."""
    new = tl.maximum(m, tl.max(z, 1))
    return new, s * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), 1)


@triton.jit
def _gradient(x, col, label, M, of_p, of_label, of_all, logit_scale, softcap):
    z, slope = _transform(x, logit_scale, softcap)
    d = tl.exp(z - M) * of_p - of_all
    return tl.where(col == label, d - of_label, d) * slope


@triton.jit
def cross_entropy_kernel(
    logits, labels, loss, maximum, total, scale, dx, logits_stride, dx_stride, scale_stride,
    logit_scale, softcap, smoothing, z_loss,
    V: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    FULL: tl.constexpr = V // BLOCK * BLOCK  # whole blocks need no mask: a mask of odd V would undo the wide loads
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + row * logits_stride
    dx_row = dx + row * dx_stride if dx is not None else None
    lane = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    full_label = tl.load(labels + row)
    if full_label == _IGNORE:
        if FORWARD:
            tl.store(loss + row, 0.0)
            if maximum is not None:
                tl.store(maximum + row, 0.0)
                tl.store(total + row, 1.0)
        if dx is not None:
            zeros = tl.zeros([BLOCK // VECTOR, VECTOR], tl.float32)
            for start in tl.range(0, V, BLOCK):
                store_as(dx_row + start + lane, zeros, start + lane < V)
        return
    exists = (full_label >= 0) & (full_label < V)
    label = tl.where(exists, full_label, 0).to(tl.int32)
    z_label = _transform(tl.load(x_row + label).to(tl.float32), logit_scale, softcap)[0]  # before dx overwrites it
    if FORWARD:
        m = tl.full([BLOCK // VECTOR], -3.4028234663852886e38, tl.float32)  # finite, for rows that begin with -inf
        s = tl.zeros([BLOCK // VECTOR], tl.float32)
        z_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
        for start in tl.range(0, FULL, BLOCK):
            z = _transform(tl.load(x_row + start + lane).to(tl.float32), logit_scale, softcap)[0]
            m, s = _absorb(z, m, s)
            if smoothing is not None:
                z_sum += tl.sum(z, 1)
        if FULL < V:
            mask = FULL + lane < V
            x = tl.load(x_row + FULL + lane, mask=mask, other=0.0).to(tl.float32)
            z = _transform(x, logit_scale, softcap)[0]
            m, s = _absorb(tl.where(mask, z, float("-inf")), m, s)
            if smoothing is not None:
                z_sum += tl.sum(tl.where(mask, z, 0.0), 1)
        M = tl.max(m, 0)
        S = tl.sum(s * tl.exp(m - M), 0)
        value = M - z_label  # exact where the label is likeliest
        if smoothing is not None:
            value = (1.0 - smoothing) * value + smoothing * (M - tl.sum(z_sum, 0) / V)
        lse = M + tl.log(S)
        value += tl.log(S) + z_loss * lse * lse
        tl.store(loss + row, tl.where(exists, value, float("nan")))
        if maximum is not None:
            tl.store(maximum + row, M)
            tl.store(total + row, S)
    else:
        M = tl.load(maximum + row)
        S = tl.load(total + row)
        lse = M + tl.log(S)
    if dx is not None:
        g = tl.where(exists, tl.load(scale + row * scale_stride), float("nan"))
        of_p = g * (1.0 + 2.0 * z_loss * lse) / S
        of_label = g
        of_all = 0.0
        if smoothing is not None:
            of_label = g * (1.0 - smoothing)
            of_all = g * smoothing / V
        if FULL < V:
            mask = FULL + lane < V
            x = tl.load(x_row + FULL + lane, mask=mask, other=0.0).to(tl.float32)
            d = _gradient(x, FULL + lane, label, M, of_p, of_label, of_all, logit_scale, softcap)
            store_as(dx_row + FULL + lane, d, mask)
        for back in tl.range(0, FULL, BLOCK):  # from the end: what was read last is still in L2
            col = FULL - BLOCK - back + lane
            d = _gradient(
                tl.load(x_row + col).to(tl.float32), col, label, M, of_p, of_label, of_all, logit_scale, softcap
            )
            store_as(dx_row + col, d, None)
