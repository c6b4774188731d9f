"""AdamW over one flat buffer: the whole update of every parameter in one launch.

    g = grad * factor                               unscaling and clipping, from `begin_step`
    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr weight_decay) - (lr / c1) m / (sqrt(v) / sqrt(c2) + eps)         c = 1 - beta^step

in float32 and in this order, as `torch.optim.AdamW` does, without contracting a * b + c into one rounding. States are
float32 or in 8 bits (`adamw_8bit`). What changes from step to step comes from device tensors, so that a captured graph
sees it: learning rates, weight decays, the step, the skip flag. Parameters in bfloat16 are rounded to nearest, or
stochastically (unbiased; bits from the seed, the step and the element), or carry what rounding lost in a second
bfloat16 buffer (Kahan).

Shapes: n elements, B = ceil(n / 256) blocks, G parameter groups. A block belongs to one group.
Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._philox import random_halves, random_halves_of
from pyralis.ops._triton import at_least_float32, cdiv, launch, round_to, store_as, tl, triton, unsupported_tensors
from pyralis.ops.adamw_8bit import BLOCK, SIGNED, UNSIGNED, State8bit, nearest_codes
from pyralis.ops.grad_norm import StepScalars

_BLOCK = tl.constexpr(BLOCK)


@dataclass(frozen=True, slots=True)
class State32bit:
    m: Tensor  # [n] float32: mean of the gradients
    v: Tensor  # [n] float32: mean of their squares

    @classmethod
    def zeros(cls, n: int, device: torch.device | str) -> State32bit:
        return cls(torch.zeros(n, device=device), torch.zeros(n, device=device))

    def moments(self) -> tuple[Tensor, Tensor]:
        """(m, v), both [n] float32."""
        return self.m, self.v

    def store(self, m: Tensor, v: Tensor, keep: Tensor) -> None:
        """Take over m and v [n] in the blocks where `keep` [B] is False; the others stay as they are."""
        for old, new in ((self.m, m), (self.v, v)):
            old.copy_(torch.where(_by_element(keep, len(old)), old, new))


@dataclass(frozen=True, slots=True)
class Groups:
    """What differs between parameter groups."""

    lr: Tensor  # [G] float32
    weight_decay: Tensor  # [G] float32
    index: Tensor | None = None  # [B] int32: the group of each block, -1 to leave it alone; None: all in group 0

    @classmethod
    def one(cls, lr: float, weight_decay: float, device: torch.device | str) -> Groups:
        return cls(torch.tensor([lr], device=device), torch.tensor([weight_decay], device=device))


@dataclass(frozen=True, slots=True)
class AdamWLaunch:
    """float32 states: four elements a thread are 16-byte accesses; any size of program reaches the GPU's bandwidth.

    8-bit states: a warp a program and a program a block, so that the block's maximum needs no barrier and one warp's
    arithmetic overlaps another's loads (42 M parameters on an H100: 271 us; four blocks in eight warps: 350 us).
    """

    rows: int  # blocks of 256 elements
    num_warps: int

    @classmethod
    def of(cls, eight_bit: bool) -> AdamWLaunch:
        return cls(1, 1) if eight_bit else cls(4, 8)


def supported(params: Tensor, grads: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernel cannot take these tensors; None if it can."""
    if not all(t is None or t.is_contiguous() for t in (params, grads, *others)):
        return "a flat buffer is not contiguous"
    return unsupported_tensors(params, grads, *others)


def adamw_step(
    params: Tensor,
    grads: Tensor,
    state: State32bit | State8bit,
    scalars: StepScalars,
    groups: Groups,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    compute_copy: Tensor | None = None,
    seed: Tensor | None = None,
    compensation: Tensor | None = None,
) -> None:
    """Update params [n] and state in place, after `begin_step` has written `scalars`.

    params, grads: flat, float32, float16 or bfloat16 each. compute_copy: [n], overwritten with the new parameters in
    its own dtype. For bfloat16 parameters, one of: seed, [1] int64 on the device, for stochastic rounding;
    compensation, [n] bfloat16, zero at first, which holds what rounding lost. Under `scalars.skip` nothing changes.
    """
    n = params.numel()
    assert grads.numel() == n, f"{grads.numel()} gradients for {n} parameters"
    assert seed is None or compensation is None, "stochastic rounding or Kahan, not both"
    assert (seed is None and compensation is None) or params.dtype == torch.bfloat16, "only bfloat16 loses that much"
    options = (scalars, groups, beta1, beta2, eps, compute_copy, seed, compensation)
    if supported(params, grads, compute_copy, compensation) is not None:
        _step_by_reference(params, grads, state, *options)
        return
    eight = isinstance(state, State8bit)
    plan = AdamWLaunch.of(eight)
    states: tuple[Tensor | None, ...]
    if isinstance(state, State8bit):
        states = (
            state.m_codes,
            state.v_codes,
            state.m_scale,
            state.v_scale,
            state.tables,
            state.slots,
            state.m,
            state.v,
        )
    else:
        states = (state.m, state.v, None, None, None, None, None, None)
    launch(
        _adamw_kernel, (cdiv(n, plan.rows * BLOCK),),
        params, grads, *states, groups.lr, groups.weight_decay, groups.index, scalars.values, scalars.step,
        compute_copy, seed, compensation, n, 1 - beta1, beta2, 1 - beta2, eps,
        device=params.device, num_warps=plan.num_warps, fp_fusion=False, EIGHT_BIT=eight, ROWS=plan.rows,
    )  # fmt: skip


def reference(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, lr: Tensor | float, weight_decay: Tensor | float,
    correction1: Tensor | float, root_correction2: Tensor | float, beta1: float, beta2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(p, m, v) after the step: the equations above, in the dtype of the inputs."""
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * (1 - beta2) * g
    denominator = v.sqrt() / root_correction2 + eps
    return p * (1 - lr * weight_decay) - (lr / correction1) * m / denominator, m, v


def round_stochastically(x: Tensor, halves: Tensor) -> Tensor:
    """float32 x [n] to bfloat16, up with the probability of the bits cut off; halves: [n] int32 in [0, 2^16)."""
    bits = ((x.contiguous().view(torch.int32) + halves) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), bits, x).to(torch.bfloat16)


def _by_element(x: Tensor, n: int) -> Tensor:
    """[B] -> [n]"""
    return x.repeat_interleave(BLOCK)[:n]


def _step_by_reference(
    params: Tensor,
    grads: Tensor,
    state: State32bit | State8bit,
    scalars: StepScalars,
    groups: Groups,
    beta1: float,
    beta2: float,
    eps: float,
    compute_copy: Tensor | None,
    seed: Tensor | None,
    compensation: Tensor | None,
) -> None:
    n, wide = params.numel(), at_least_float32(params.dtype)
    lr, decay = groups.lr[0], groups.weight_decay[0]
    keep = (scalars.skip != 0).expand(cdiv(n, BLOCK))
    if groups.index is not None:
        keep = keep | (groups.index < 0)
        index = groups.index.clamp(min=0)
        lr, decay = _by_element(groups.lr[index], n), _by_element(groups.weight_decay[index], n)
    p = params.to(wide)
    if compensation is not None:
        p = p + compensation
    p, m, v = reference(
        p, grads.to(wide) * scalars.factor, *state.moments(), lr=lr, weight_decay=decay,
        correction1=scalars.correction1, root_correction2=scalars.root_correction2, beta1=beta1, beta2=beta2, eps=eps,
    )  # fmt: skip
    state.store(m, v, keep)
    keep = _by_element(keep, n)
    if seed is not None:
        params.copy_(torch.where(keep, params, round_stochastically(p, random_halves(seed, scalars.step, n))))
    else:
        params.copy_(torch.where(keep, params, p.to(params.dtype)))
    if compensation is not None:
        compensation.copy_(torch.where(keep, compensation, (p - params).to(compensation.dtype)))
    if compute_copy is not None:
        compute_copy.copy_(torch.where(keep, compute_copy, params.to(compute_copy.dtype)))


@triton.jit
def _adamw_kernel(
    parameters, grads, m_state, v_state, m_scale, v_scale, tables, slots, m_wide, v_wide,
    group_lr, group_decay, group_index, scalars, step, compute_copy, seed, compensation,
    n, one_minus_beta1, beta2, one_minus_beta2, eps, EIGHT_BIT: tl.constexpr, ROWS: tl.constexpr,
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
    if compensation is not None:
        p += tl.load(compensation + at, mask=inside, other=0.0).to(tl.float32)

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
        halves = random_halves_of(tl.load(seed), tl.load(step), block, ROWS, _BLOCK)
        rounded = ((p.to(tl.uint32, bitcast=True) + halves) & 0xFFFF0000).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(p) < float("inf"), rounded, p)
    else:
        rounded = p
    store_as(parameters + at, rounded, live)
    if compensation is not None:
        rounded = round_to(p, parameters.dtype.element_ty)
        store_as(compensation + at, p - rounded, live)
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
