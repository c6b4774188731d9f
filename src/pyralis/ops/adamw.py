"""AdamW over one flat buffer: the whole update of every parameter in one launch.

    g = grad * factor                               unscaling and clipping, from `begin_step`
    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr weight_decay) - (lr / c1) m / (sqrt(v) / sqrt(c2) + eps)         c = 1 - beta^step

in float32 and in this order, as `torch.optim.AdamW` does, without contracting a * b + c into one rounding. States are
float32 or in 8 bits (`adamw_8bit`). What changes from step to step comes from device tensors, so that a captured graph
sees it: learning rates, weight decays, the step, the skip flag. Parameters in bfloat16 are rounded to nearest, which
loses updates below 0.2 % of a weight; or stochastically (unbiased; bits from the seed, the step and the element); or
they are the upper halves of float32 ones whose lower 16 bits are kept beside them: then nothing is lost.

Shapes: n elements, B = ceil(n / 256) blocks, G parameter groups. A block belongs to one group.
Sources: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019); split weights: Kalamkar et al., Optimizing
Deep Learning Recommender Systems Training on CPU Cluster Architectures (2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._adamw_kernels import adamw_kernel
from pyralis.ops._philox import random_halves
from pyralis.ops._triton import at_least_float32, cdiv, launch, unsupported_tensors
from pyralis.ops.adamw_8bit import BLOCK, State8bit
from pyralis.ops.grad_norm import StepScalars


@dataclass(frozen=True, slots=True)
class State32bit:
    m: Tensor  # [n] float32: mean of the gradients
    v: Tensor  # [n] float32: mean of their squares

    @classmethod
    def zeros(cls, n: int, device: torch.device | str, *, allocate: Callable[..., Tensor] = torch.zeros) -> State32bit:
        """allocate: what `torch.zeros` is called for: (n, dtype=..., device=...)."""
        return cls(*(allocate(n, dtype=torch.float32, device=device) for _ in range(2)))

    def part(self, elements: slice, blocks: slice) -> State32bit:
        """Views of these elements, which are those of these blocks."""
        return State32bit(self.m[elements], self.v[elements])

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
    low_bits: Tensor | None = None,
    first_block: int = 0,
) -> None:
    """Update params [n] and state in place, after `begin_step` has written `scalars`.

    params, grads: flat, float32, float16 or bfloat16 each. compute_copy: [n], overwritten with the new parameters in
    its own dtype. For bfloat16 parameters, one of: seed, [1] int64 on the device, for stochastic rounding;
    low_bits, [n] int16, zero at first (`split`). Under `scalars.skip` nothing changes.
    first_block: which block of a larger buffer params begin with: the bits of stochastic rounding are those of the
    elements there, however the buffer is cut.
    """
    n = params.numel()
    assert grads.numel() == n, f"{grads.numel()} gradients for {n} parameters"
    assert seed is None or low_bits is None, "stochastic rounding or split weights, not both"
    assert (seed is None and low_bits is None) or params.dtype == torch.bfloat16, "only bfloat16 loses that much"
    options = (scalars, groups, beta1, beta2, eps, compute_copy, seed, low_bits, first_block)
    assert low_bits is None or low_bits.is_contiguous(), "the lower bits are a flat buffer"
    if supported(params, grads, compute_copy) is not None:
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
        adamw_kernel, (cdiv(n, plan.rows * BLOCK),),
        params, grads, *states, groups.lr, groups.weight_decay, groups.index, scalars.values, scalars.step,
        compute_copy, seed, low_bits, n, first_block, 1 - beta1, beta2, 1 - beta2, eps,
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


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 x [n] -> (the nearest bfloat16, what has to be added to its bits as a float32 to have x's: int16).

    Half way between two bfloat16 the larger magnitude is taken: the difference is in [-2^15, 2^15).
    """
    finite = x.isfinite()
    bits = torch.where(finite, x, 0.0).view(torch.int32)
    upper = (bits + 0x8000) & -65536
    rounded = torch.where(finite, upper.view(torch.float32), x).to(torch.bfloat16)
    return rounded, (bits - upper).to(torch.int16)


def joined(upper: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 numbers that were split."""
    return (upper.float().view(torch.int32) + low_bits).view(torch.float32)


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
    low_bits: Tensor | None,
    first_block: int,
) -> None:
    n, wide = params.numel(), at_least_float32(params.dtype)
    lr, decay = groups.lr[0], groups.weight_decay[0]
    keep = (scalars.skip != 0).expand(cdiv(n, BLOCK))
    if groups.index is not None:
        keep = keep | (groups.index < 0)
        index = groups.index.clamp(min=0)
        lr, decay = _by_element(groups.lr[index], n), _by_element(groups.weight_decay[index], n)
    p = params.to(wide) if low_bits is None else joined(params, low_bits)
    p, m, v = reference(
        p, grads.to(wide) * scalars.factor, *state.moments(), lr=lr, weight_decay=decay,
        correction1=scalars.correction1, root_correction2=scalars.root_correction2, beta1=beta1, beta2=beta2, eps=eps,
    )  # fmt: skip
    state.store(m, v, keep)
    keep = _by_element(keep, n)
    if seed is not None:
        halves = random_halves(seed, scalars.step, n, first_block * BLOCK)
        params.copy_(torch.where(keep, params, round_stochastically(p, halves)))
    elif low_bits is not None:
        upper, lower = split(p)
        params.copy_(torch.where(keep, params, upper))
        low_bits.copy_(torch.where(keep, low_bits, lower))
    else:
        params.copy_(torch.where(keep, params, p.to(params.dtype)))
    if compute_copy is not None:
        compute_copy.copy_(torch.where(keep, compute_copy, params.to(compute_copy.dtype)))
